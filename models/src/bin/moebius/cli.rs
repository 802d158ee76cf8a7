//! The command line.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};
use moebius_models::config::{Moments, Recompute};

/// Train, evaluate and sample sparse-expert language models (PR-MoE) on any machine.
#[derive(Parser)]
#[command(
    name = "moebius",
    version,
    max_term_width = 110,
    after_help = "\
Examples:
  moebius train                                     train the quick-start model on Tiny Shakespeare
  moebius train --data book.txt --out runs/book     train it on your own text, byte by byte
  moebius distill --teacher runs/book --layers 3    train a shallower student that follows it
  moebius generate --model runs/book --prompt \"Once\" --tokens 200
  moebius study pyramid --scale cpu                 do MoE layers help most near the output? tables, plots, a verdict
  moebius inspect --preset 350m-pr-moe-32-64        size, FLOPs and memory of a paper's model

Exit codes: 0 done, 1 failed, 2 wrong use, 3 ended by an alarm (--alarm-exit) with a checkpoint, 130 stopped by
Ctrl-C: training after the step, with a checkpoint; `generate` after the token."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Train a model; with no arguments, the quick-start model (tiny-pr-moe) on the built-in Tiny Shakespeare
    Train(TrainArgs),
    /// Train a student that follows a trained teacher for a part of the run
    Distill(DistillArgs),
    /// Train the few models that a claim of the DeepSpeed-MoE paper is about, and write tables, plots and verdicts
    Study(StudyArgs),
    /// Mean loss and bits per byte of a trained model on a text
    Eval(EvalArgs),
    /// Continue a text with a trained model
    Generate(GenerateArgs),
    /// Parameters, FLOPs and memory of a preset or a trained model
    Inspect(InspectArgs),
    /// The devices this program can compute on, and why not on others
    Devices(DevicesArgs),
    /// Compare every op and whole layers with the reference, on this machine
    Verify(VerifyArgs),
    /// Measure training steps or decoding on this machine
    Bench(BenchArgs),
    /// Look at routes that `eval` or `generate` recorded
    Routes(RoutesArgs),
}

#[derive(Args)]
pub(crate) struct TrainArgs {
    /// Model and training settings by name (see `inspect --list`)
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    pub(crate) preset: Option<String>,
    /// Model and training settings from a TOML file
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Text to train on; may be given several times [default: the built-in Tiny Shakespeare]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Vec<PathBuf>,
    /// Text to validate on [default: the last tenth of each --data]
    #[arg(long, value_name = "FILE")]
    pub(crate) val_data: Vec<PathBuf>,
    /// A tokenizer.json; without one, every byte is a token
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Training steps [default: the preset's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) steps: Option<u64>,
    /// Seed of start values and batches [default: the preset's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
    /// Device to compute on: auto, cpu, cuda, cuda:N, vulkan, vulkan:N or vulkan:NAME
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Folder for metrics, checkpoints and report [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Go on with the run in --out from its newest intact checkpoint
    #[arg(long)]
    pub(crate) resume: bool,
    /// Steps between checkpoints
    #[arg(long, value_name = "N")]
    pub(crate) checkpoint_every: Option<u64>,
    /// Steps between evaluations
    #[arg(long, value_name = "N")]
    pub(crate) eval_every: Option<u64>,
    /// Micro-batches in a step: the gradient is the mean of theirs, and memory is taken for one [default: the preset's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) accumulate: Option<usize>,
    /// Compute the inside of each block again in the backward pass instead of keeping it: less memory, more time; or only what costs
    /// little (`light`) [default: the preset's]
    #[arg(long, value_name = "WHAT", num_args = 0..=1, default_missing_value = "true")]
    pub(crate) recompute: Option<Recompute>,
    /// How the optimizer keeps its moments: f32, or rounded stochastically in bf16 (half the memory) or 8bit (a quarter) [default: the
    /// preset's]
    #[arg(long, value_name = "KIND")]
    pub(crate) moments: Option<Moments>,
    /// Warn once when a router leaves its limits, as in `dead-experts=100,drop=0.3`; keys: dead-experts (steps without a
    /// token), drop (at most, fraction of choices), entropy (at least, nats per token), coefficient (LOW..HIGH),
    /// logit-scale (at most) [default: train.alarm]
    #[arg(long, value_name = "KEY=LIMIT,...")]
    pub(crate) alarm: Option<String>,
    /// End the run at an alarm, with a checkpoint and exit code 3
    #[arg(long)]
    pub(crate) alarm_exit: bool,
    /// Change one setting, as in `--set train.batch=8 --set model.experts=[4,8]`
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[derive(Args)]
pub(crate) struct DistillArgs {
    /// The teacher: a run's folder, or one of its checkpoints. With --resume: where it was moved to, if it was
    #[arg(long, value_name = "DIR", required_unless_present = "resume")]
    pub(crate) teacher: Option<PathBuf>,
    /// The student is the teacher with so many layers, and the experts that go with them
    #[arg(long, value_name = "N", allow_negative_numbers = true, conflicts_with_all = ["preset", "config"])]
    pub(crate) layers: Option<usize>,
    /// When the teacher leaves and its memory is given back: a fraction of the run (0: it is plain training, 1: never), or as
    /// `400steps` or `1000000tokens` [default: 0.7]
    #[arg(long, value_name = "STOP", allow_negative_numbers = true, conflicts_with = "resume")]
    pub(crate) kd_stop: Option<String>,
    /// Weight of the divergence from the teacher in the loss [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, conflicts_with = "resume")]
    pub(crate) kd_weight: Option<f64>,
    /// Temperature that the logits of both are divided by [default: 1]
    #[arg(long, value_name = "T", allow_negative_numbers = true, conflicts_with = "resume")]
    pub(crate) kd_temp: Option<f64>,
    /// Weight of the cross entropy while there is a teacher, as in `--lm-weight 0.75 --kd-weight 0.25` [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, conflicts_with = "resume")]
    pub(crate) lm_weight: Option<f64>,
    /// Begin with the teacher's weights, layer by layer from the nearest one; what does not fit begins anew
    #[arg(long, conflicts_with = "resume")]
    pub(crate) init_from_teacher: bool,
    /// Keep the teacher's likeliest tokens in a file of this folder, built first if it is not there: training then needs no
    /// teacher in memory
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub(crate) teacher_cache: Option<PathBuf>,
    /// Tokens that the cache keeps for each token of the text; all others are one [default: 32]
    #[arg(long, value_name = "K", requires = "teacher_cache")]
    pub(crate) cache_top: Option<usize>,
    #[command(flatten)]
    pub(crate) train: TrainArgs,
}

#[derive(Args)]
pub(crate) struct StudyArgs {
    /// Which study
    #[arg(value_name = "NAME", value_parser = moebius_models::study::NAMES)]
    pub(crate) name: String,
    /// Size of the models: seconds on two cores, minutes on two cores, minutes on a large GPU
    #[arg(long, value_enum, default_value = "cpu")]
    pub(crate) scale: ScaleName,
    /// Parent folder: runs are in DIR/runs, shared by the studies there; tables, plots and report in DIR/NAME
    #[arg(long, value_name = "DIR", default_value = "studies")]
    pub(crate) out: PathBuf,
    /// Text, read as bytes: 90 % to train on, 5 % to validate on, 5 % for the test [default: the built-in Tiny Shakespeare]
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Runs of each arm, with seeds from 1 on [default: 3, smoke 2]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seeds: Option<usize>,
    /// Tune learning rate and auxiliary coefficient first, by the same short grid for every arm on a seed of its own
    #[arg(long)]
    pub(crate) tune: bool,
    /// Stop after this time with a checkpoint, as 90s, 9m or 1h; the same command goes on
    #[arg(long = "for", value_name = "TIME")]
    pub(crate) time: Option<String>,
    /// Keep the checkpoints of finished runs
    #[arg(long)]
    pub(crate) keep_checkpoints: bool,
    /// Device to compute on: auto, cpu, cuda, cuda:N, vulkan, vulkan:N or vulkan:NAME
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Change one setting of every arm, as in `--set train.steps=200`
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ScaleName {
    /// Very small models, to see that everything works; the losses mean nothing
    Smoke,
    /// Half a million active parameters, Tiny Shakespeare
    Cpu,
    /// 20 million active parameters, 50 million bytes a run; meant for enwik8
    Gpu,
}

#[derive(Args)]
pub(crate) struct EvalArgs {
    /// A run's folder, or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Text to evaluate on, all of it
    #[arg(long, value_name = "FILE", required = true)]
    pub(crate) data: Vec<PathBuf>,
    /// Sequences per forward pass
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 8)]
    pub(crate) batch: usize,
    /// Write the experts of each token, layer by layer, to a route file (see `moebius routes`)
    #[arg(long, value_name = "FILE")]
    pub(crate) record_routes: Option<PathBuf>,
    /// Send each token to the experts that a route file has for it; gates are still those of the model's router
    #[arg(long, value_name = "FILE")]
    pub(crate) replay_routes: Option<PathBuf>,
    /// Device to compute on: auto, cpu, cuda, cuda:N, vulkan, vulkan:N or vulkan:NAME
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// A run's folder, or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// The text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: String,
    /// How many tokens to add
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 200)]
    pub(crate) tokens: usize,
    /// Randomness: 0 takes the most likely token each time
    #[arg(long, value_name = "T", allow_negative_numbers = true, default_value_t = 0.8)]
    pub(crate) temperature: f32,
    /// Choose among the K most likely tokens only; 0 means all
    #[arg(long, value_name = "K", allow_negative_numbers = true, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Choose among the likeliest tokens that make up this probability; 1 means all
    #[arg(long, value_name = "P", allow_negative_numbers = true, default_value_t = 0.95)]
    pub(crate) top_p: f32,
    /// Seed of the choices: the same seed gives the same text
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Write the experts of each token, layer by layer, to a route file (see `moebius routes`)
    #[arg(long, value_name = "FILE")]
    pub(crate) record_routes: Option<PathBuf>,
    /// Send each token to the experts that a route file has for it; gates are still those of the model's router
    #[arg(long, value_name = "FILE")]
    pub(crate) replay_routes: Option<PathBuf>,
    /// Device to compute on: auto, cpu, cuda, cuda:N, vulkan, vulkan:N or vulkan:NAME
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
}

#[derive(Args)]
#[group(skip)]
#[command(group(ArgGroup::new("what").required(true).multiple(false)))]
pub(crate) struct InspectArgs {
    /// A preset by name
    #[arg(long, value_name = "NAME", group = "what")]
    pub(crate) preset: Option<String>,
    /// A TOML file
    #[arg(long, value_name = "FILE", group = "what")]
    pub(crate) config: Option<PathBuf>,
    /// A run's folder, or one of its checkpoints
    #[arg(long, value_name = "DIR", group = "what")]
    pub(crate) model: Option<PathBuf>,
    /// List the presets
    #[arg(long, group = "what")]
    pub(crate) list: bool,
    /// Batch size for the memory of activations [default: the preset's]
    #[arg(long, value_name = "B")]
    pub(crate) batch: Option<usize>,
    /// Device whose memory training is held against: auto, cpu, cuda, cuda:N, vulkan, vulkan:N or vulkan:NAME
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub(crate) device: String,
    /// Change one setting, as in `--set model.experts=[4,8]`
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// Device to verify: auto, cpu, cuda, cuda:N, vulkan, vulkan:N or vulkan:NAME
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Only this op, or one of moe_layer, residual_moe_layer, decoder, published_routers; may be given several times
    #[arg(long, value_name = "NAME")]
    pub(crate) op: Vec<String>,
    /// Seed of the inputs that are drawn
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 0)]
    pub(crate) seed: u32,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// What to measure
    #[arg(value_enum)]
    pub(crate) what: BenchKind,
    /// The model by name
    #[arg(long, value_name = "NAME", default_value = "bench-cpu", conflicts_with = "config")]
    pub(crate) preset: String,
    /// The model from a TOML file
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Device to compute on: auto, cpu, cuda, cuda:N, vulkan, vulkan:N or vulkan:NAME
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// The layer of `layer`
    #[arg(long, value_name = "CASE", default_value = "small",
        value_parser = ["A", "A2", "B", "C", "D", "E1", "E8", "E64", "E256", "small"])]
    pub(crate) case: String,
    /// Of `layer`, print instead by which rule each product gets its kernel and tiles: for `cuda` alone, for an H100 where there is no GPU
    #[arg(long)]
    pub(crate) explain: bool,
    /// How the tokens of `layer` spread over its experts
    #[arg(long, value_enum, default_value = "uniform")]
    pub(crate) routing: Routing,
    /// The teacher of `distill`: a model by name, with start values
    #[arg(long, value_name = "NAME")]
    pub(crate) teacher: Option<String>,
    /// Tokens that the cache of `distill` keeps for each token
    #[arg(long, value_name = "K", default_value_t = 32)]
    pub(crate) cache_top: usize,
    /// Measured steps, or decoded tokens [default: 12 steps, 128 tokens]
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<usize>,
    /// Print the time of every op of the plan too
    #[arg(long)]
    pub(crate) profile: bool,
    /// Of `step`, `distill` and `layer`: what the backward pass computes again, as in `train`; of `layer` only `light`
    #[arg(long, value_name = "WHAT", num_args = 0..=1, default_missing_value = "true")]
    pub(crate) recompute: Option<Recompute>,
    /// Change one setting, as in `--set train.batch=8`
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchKind {
    /// Whole training steps: forward, backward, clipping, AdamW
    Step,
    /// Generation of one token at a time with a key/value cache
    Decode,
    /// Training steps of a student: plain, taught from a cache, and by a teacher in memory, side by side
    Distill,
    /// One sparse layer, forward and with its gradients, against what the machine reaches on a plain product and copy
    Layer,
}

/// How tokens spread over the experts.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Routing {
    /// Evenly, by chance
    Uniform,
    /// By Zipf's law
    Skew,
}

#[derive(Args)]
pub(crate) struct RoutesArgs {
    #[command(subcommand)]
    pub(crate) command: RoutesCommand,
}

#[derive(Subcommand)]
pub(crate) enum RoutesCommand {
    /// What a route file holds: load and drops of each layer, and the experts of the first tokens
    Show(RoutesShowArgs),
    /// Drop rate and load that other capacity factors would give, without running the model again
    WhatIf(WhatIfArgs),
}

#[derive(Args)]
pub(crate) struct RoutesShowArgs {
    /// A route file
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Print the experts of so many tokens, from the first
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) tokens: u64,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct WhatIfArgs {
    /// A route file
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Slots of an expert as a multiple of its share of the tokens; several, as in `1,1.25,2`
    #[arg(long, value_name = "X,...", value_delimiter = ',', required = true, allow_negative_numbers = true)]
    pub(crate) capacity_factor: Vec<f64>,
    /// Least slots of an expert [default: the model's]
    #[arg(long, value_name = "N")]
    pub(crate) min_capacity: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
