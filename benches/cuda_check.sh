#!/usr/bin/env bash
# Checks the CUDA backend on a machine with an NVIDIA GPU and no Rust.
#
#   benches/cuda_check.sh pack        on a machine with Rust: builds the tests and the program into target/cuda-check
#   benches/cuda_check.sh run [OUT]   on the machine with the GPU, in a copy of the tree with that folder: runs them
#
# `run` prints a table, and writes the whole output of each row to OUT (default: target/cuda-check/out).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
box=target/cuda-check

pack() {
    set -e
    mkdir -p "$box"
    local names
    names=$(cargo test -p moebius-tests --test conformance --test goldens --test cuda_kernels --no-run --message-format=json \
        | sed -n 's/.*"executable":"\([^"]*\/\(conformance\|goldens\|cuda_kernels\)-[0-9a-f]*\)".*/\1/p')
    for file in $names; do
        local name
        name=$(basename "$file")
        cp "$file" "$box/${name%-*}"
    done
    cargo build --release -p moebius-models
    cp target/release/moebius "$box/"
    strip "$box"/conformance "$box"/goldens "$box"/cuda_kernels "$box"/moebius
    du -sh "$box"
}

table=()
failed=0

# row NAME COMMAND..: runs a command and notes how it ended; the last line it printed says what it found.
row() {
    local name=$1 begun=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1 </dev/null; then
        table+=("$(printf '%-34s ok      %4s s  %s' "$name" $((SECONDS - begun)) "$(grep -v '^$' "$out/$name.log" | tail -n 1 | cut -c 1-90)")")
    else
        failed=$((failed + 1))
        table+=("$(printf '%-34s FAILED  %4s s  %s' "$name" $((SECONDS - begun)) "$(grep -m 1 -iE 'failures|error|panicked' "$out/$name.log" | cut -c 1-90)")")
    fi
}

# The losses of a run, one a line.
losses() {
    sed -n 's/.*"loss":\([-0-9.e+]*\).*/\1/p' "$1/metrics.jsonl"
}

# Losses of 20 steps on the GPU are those of the processor within 1e-4.
same_losses() {
    paste <(losses "$out/cpu") <(losses "$out/cuda") | awk '
        NF == 2 { d = $1 - $2; if (d < 0) d = -d; d /= ($1 < 0 ? -$1 : $1); if (d > worst) worst = d; n++ }
        END { print n " losses, largest relative difference " worst; exit !(n >= 20 && worst <= 1e-4) }'
}

# Two runs give the same bits.
same_bits() {
    losses "$out/cuda" >"$out/first" && losses "$out/cuda-again" >"$out/second"
    cmp "$out/first" "$out/second" && echo "$(wc -l <"$out/first") losses, the same"
}

run() {
    out=${1:-$box/out}
    mkdir -p "$out"
    export MOEBIUS_DEVICE=cuda MOEBIUS_GOLDENS=$PWD/tests/goldens MOEBIUS_CACHE=${MOEBIUS_CACHE:-$out/cache}
    local train=("$box/moebius" train --steps 20 --set train.log_every=1)
    row devices "$box/moebius" devices
    row kernels "$box/cuda_kernels" --nocapture
    # In one process, so that kernels of many cases are compiled side by side.
    row conformance "$box/conformance"
    while read -r line; do
        table+=("    $line")
    done < <(sed -n 's/^test \([a-z_:]*\) \.\.\. \(.*\)/\1 \2/p' "$out/conformance.log")
    row goldens "$box/goldens" --exact every_case_agrees_on_every_device --nocapture
    rm -rf "$out"/cpu "$out"/cuda "$out"/cuda-again
    row train-cpu "${train[@]}" --device cpu --out "$out/cpu"
    row train-cuda "${train[@]}" --device cuda --out "$out/cuda"
    row train-cuda-again "${train[@]}" --device cuda --out "$out/cuda-again"
    row losses-follow-the-cpu same_losses
    row two-runs-same-bits same_bits
    row bench-step "$box/moebius" bench step --device cuda --profile --json
    row bench-decode "$box/moebius" bench decode --device cuda --json
    if command -v compute-sanitizer >/dev/null; then
        row memcheck compute-sanitizer --error-exitcode 9 "$box/conformance" --exact values::sparse --test-threads 1
    else
        table+=("memcheck                           left out: there is no compute-sanitizer")
    fi
    printf '%s\n' "${table[@]}"
    echo "$failed failed"
    return $((failed > 0))
}

case ${1:-} in
    pack) pack ;;
    run) run "${2:-}" ;;
    *) sed -n '2,9p' "$0" && exit 2 ;;
esac
