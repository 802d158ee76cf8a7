//! The text of a kernel in WGSL, put together from its body in `shaders/`, headers, and declarations written here: so that the names
//! of buffers and numbers in a text and what the launch gives cannot differ.
//!
//! A body defines `fn kernel(group, thread)`: the workgroup's number (or `vec3` of numbers, see [`Shader::grid`]) and the thread's
//! within it. For each buffer `x` there is `get_x(i)`, and `set_x(i, value)` unless it is of bools: floats of any width are f32
//! there. The numbers are the fields of `p`.

use std::fmt::Write;

use moebius_ir::DType;

use super::device::NUMBER_BYTES;
use super::launch::{Action, At, Kernel, Number};
use super::limits::Limits;

/// A whole text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its file, for errors and names.
    pub(crate) title: String,
    pub(crate) text: String,
    /// How many buffers it has.
    pub(crate) buffers: usize,
    /// The dtype of the factors of its cooperative matrices, if it has any.
    pub(crate) cooperative: Option<DType>,
}

/// The texts of `shaders/` by name.
macro_rules! texts {
    ($($name:literal),+ $(,)?) => {
        fn text(name: &str) -> Option<&'static str> {
            match name {
                $($name => Some(include_str!(concat!("shaders/", $name, ".wgsl"))),)+
                _generated => None,
            }
        }
    };
}
texts! {
    "adamw",
    "adamw_8bit",
    "adamw_bf16",
    "adamw_rule",
    "assign",
    "assign_in_order",
    "attend_cache",
    "attend_cache_eight",
    "attend_one",
    "attention",
    "attention_delta",
    "attention_grad_key",
    "attention_grad_query",
    "cache_places",
    "cache_rows",
    "choice_by_route",
    "choice_by_softmax",
    "combine",
    "combine_eight",
    "count_choices",
    "cross_entropy_grad",
    "cross_entropy_rows",
    "cross_entropy_tiles",
    "dispatch",
    "dispatch_eight",
    "distillation_grad",
    "distillation_rows",
    "distillation_tiles",
    "eight",
    "embedding",
    "embedding_grad",
    "floats",
    "fold",
    "functions",
    "gate_grad",
    "gemm",
    "gemm_added",
    "gemm_by_slot",
    "gemm_by_token",
    "gemm_few_rows",
    "gemm_finish",
    "gemm_k_grouped",
    "gemm_m_grouped",
    "gemm_places",
    "gemm_plain",
    "gemm_put",
    "gemm_put_eight",
    "gemm_slot",
    "gemm_tile",
    "heads",
    "kept_grad",
    "kept_rows",
    "kept_tiles",
    "lanes",
    "lanes_apart",
    "layer_norm",
    "layer_norm_row",
    "lead_dispatch",
    "lead_none",
    "lead_norm",
    "lead_token",
    "logits",
    "move_views",
    "norm_grad",
    "norm_grad_eight",
    "norm_of_parts",
    "norm_row",
    "norm_rows",
    "norm_weights",
    "norm_weights_finish",
    "philox",
    "powers",
    "random",
    "reduce",
    "reduce_columns",
    "reduce_finish",
    "reduce_rows",
    "rms_norm",
    "rms_norm_row",
    "route",
    "route_end",
    "route_grad",
    "route_totals",
    "routed",
    "router",
    "router_apart",
    "router_lanes",
    "row_sums",
    "segment_sum",
    "slot_by_choice",
    "slot_by_offsets",
    "softmax",
    "softmax_grad",
    "sum_of_squares",
    "sums",
    "sums_by_lanes",
    "tile_sums",
}

/// A kernel under construction.
pub(crate) struct Shader {
    title: &'static str,
    limits: Limits,
    declarations: String,
    buffers: Vec<At>,
    fields: String,
    numbers: Vec<Number>,
    headers: Vec<&'static str>,
    body: String,
    halves: bool,
    cooperative: Option<DType>,
    threads: usize,
    /// What cannot be.
    wanted: Option<String>,
}

impl Shader {
    /// The kernel of a text, with so many threads in a workgroup.
    pub(crate) fn new(limits: Limits, title: &'static str, body: impl Into<String>, threads: usize) -> Shader {
        let declarations = format!("const THREADS: u32 = {threads}u;\n");
        Shader {
            title,
            limits,
            declarations,
            buffers: Vec::new(),
            fields: String::new(),
            numbers: Vec::new(),
            headers: vec!["floats"],
            body: body.into(),
            halves: false,
            cooperative: None,
            threads,
            wanted: None,
        }
    }

    /// The kernel of a file of `shaders/`.
    pub(crate) fn file(limits: Limits, name: &'static str, threads: usize) -> Shader {
        Shader::new(limits, name, text(name).unwrap_or_else(|| unreachable!("{name} is a file")), threads)
    }

    /// With another file of `shaders/` before its text.
    #[must_use]
    pub(crate) fn with(mut self, header: &'static str) -> Shader {
        self.headers.push(header);
        self
    }

    /// With `other_one(thread, x, mask)`, `other_two` and `other_four`: what another of the same 32 threads has.
    #[must_use]
    pub(crate) fn lanes(self) -> Shader {
        let name = if self.limits.shuffles { "lanes" } else { "lanes_apart" };
        self.with(name)
    }

    /// With `fold_into(thread, base, even, odd)`: sums of eight columns over the lanes of 32 threads, `across` of which have different
    /// columns, in `folded`, of so many floats.
    #[must_use]
    pub(crate) fn folding(self, across: usize, room: usize) -> Shader {
        self.lanes().with("fold").constant("ACROSS", across).constant("FOLDED", room)
    }

    /// With sums and maxima over a workgroup: `block_sum(thread, x)`, `block_max` and `block_count`.
    #[must_use]
    pub(crate) fn sums(self) -> Shader {
        let threads = self.threads;
        self.sums_of(threads)
    }

    /// With those over its first 32, 64, 128 or 256 threads.
    #[must_use]
    pub(crate) fn sums_of(self, threads: usize) -> Shader {
        let name = if self.limits.shuffles { "sums_by_lanes" } else { "sums" };
        self.with(name).constant("SUMMED", threads)
    }

    /// With `name` in its text replaced.
    #[must_use]
    pub(crate) fn replace(mut self, name: &str, by: &str) -> Shader {
        self.body = self.body.replace(name, by);
        self
    }

    /// With more declarations.
    #[must_use]
    pub(crate) fn declare(mut self, text: &str) -> Shader {
        self.declarations.push_str(text);
        self.declarations.push('\n');
        self
    }

    /// With a constant of type u32.
    #[must_use]
    pub(crate) fn constant(mut self, name: &str, value: usize) -> Shader {
        let _ = writeln!(self.declarations, "const {name}: u32 = {value}u;");
        self
    }

    /// With a constant of type bool.
    #[must_use]
    pub(crate) fn flag(mut self, name: &str, value: bool) -> Shader {
        let _ = writeln!(self.declarations, "const {name}: bool = {value};");
        self
    }

    /// With cooperative matrices, whose factors have this dtype.
    #[must_use]
    pub(crate) fn cooperative(mut self, dtype: DType) -> Shader {
        self.cooperative = Some(dtype);
        self
    }

    /// With a buffer of elements of 16 bits that are only moved, in parts of 16 bytes.
    #[must_use]
    pub(crate) fn parts(mut self, name: &str, at: At) -> Shader {
        self.binding(name, "vec4<f32>", at);
        self
    }

    /// With a buffer of floats that are read by `eight_NAME(at)` and stored by `set_eight_NAME(at, value)`, eight at a time, from element
    /// `at` on, a multiple of eight; for texts with `eight.wgsl`.
    #[must_use]
    pub(crate) fn by_eight(mut self, name: &str, dtype: DType, at: At) -> Shader {
        if dtype.bytes() == 2 && !self.limits.halves {
            self.want(format!("f32: the device cannot read and write {dtype}"));
        }
        // As loaded, and of that the floats: who loads early and needs them late keeps the former in fewer registers.
        let (raw, load, floats, set) = if at == At::Null {
            ("vec4<u32>", "vec4<u32>()".to_owned(), "Eight()", String::new())
        } else if dtype.bytes() == 2 {
            self.binding(name, "vec4<u32>", at);
            let (of, floats) =
                if dtype == DType::Bf16 { ("bf16", "eight_of_bf16(raw)") } else { ("f16", "eight_of_f16(raw)") };
            ("vec4<u32>", format!("{name}[nth >> 3u]"), floats, format!("{name}[nth >> 3u] = {of}_of_eight(put);"))
        } else {
            self.binding(name, "vec4<u32>", at);
            let (low, high) = (format!("{name}[nth >> 2u]"), format!("{name}[(nth >> 2u) + 1u]"));
            let set = format!("{low} = low_of_eight(put); {high} = high_of_eight(put);");
            ("RawF32", format!("RawF32({low}, {high})"), "eight_of_f32(raw.low, raw.high)", set)
        };
        let _ = writeln!(
            self.declarations,
            "const HAS_{}: bool = {};\nalias Raw_{name} = {raw};\nfn raw_{name}(nth: u32) -> Raw_{name} {{ return {load}; }}\n\
             fn of_raw_{name}(raw: Raw_{name}) -> Eight {{ return {floats}; }}\n\
             fn eight_{name}(nth: u32) -> Eight {{ return of_raw_{name}(raw_{name}(nth)); }}\n\
             fn set_eight_{name}(nth: u32, put: Eight) {{ {set} }}",
            name.to_uppercase(),
            at != At::Null
        );
        self
    }

    fn binding(&mut self, name: &str, element: &str, at: At) {
        let binding = self.buffers.len();
        let _ = writeln!(
            self.declarations,
            "@group(0) @binding({binding}) var<storage, read_write> {name}: array<{element}>;"
        );
        self.buffers.push(at);
    }

    /// With a buffer of elements of a dtype.
    #[must_use]
    pub(crate) fn buffer(mut self, name: &str, dtype: DType, at: At) -> Shader {
        let (element, value) = match dtype {
            DType::F32 => ("f32", "f32"),
            DType::Bf16 | DType::F16 => ("u16", "f32"),
            DType::I32 => ("i32", "i32"),
            DType::U32 => ("u32", "u32"),
            DType::Bool => ("u32", "u32"),
        };
        let _ = writeln!(self.declarations, "const HAS_{}: bool = {};", name.to_uppercase(), at != At::Null);
        if at == At::Null {
            let _ = writeln!(
                self.declarations,
                "fn get_{name}(nth: u32) -> {value} {{ return {value}(0); }}\nfn set_{name}(nth: u32, put: {value}) {{}}"
            );
            return self;
        }
        if element == "u16" {
            self.halves = true;
            if !self.limits.halves {
                self.want(format!("f32: the device cannot read and write {dtype}"));
            }
        }
        self.binding(name, element, at);
        let (get, set) = match dtype {
            DType::F32 | DType::I32 | DType::U32 => (format!("{name}[nth]"), Some("put")),
            DType::Bf16 => (format!("bf16_to_float(u32({name}[nth]))"), Some("u16(bf16_bits(put))")),
            DType::F16 => (format!("f16_to_float(u32({name}[nth]))"), Some("u16(f16_bits(put))")),
            DType::Bool => (format!("({name}[nth >> 2u] >> (8u * (nth & 3u))) & 0xffu"), None),
        };
        let _ = writeln!(self.declarations, "fn get_{name}(nth: u32) -> {value} {{ return {get}; }}");
        if let Some(set) = set {
            let _ = writeln!(self.declarations, "fn set_{name}(nth: u32, put: {value}) {{ {name}[nth] = {set}; }}");
        }
        self
    }

    /// With a buffer of elements of 1, 2 or 4 bytes that are only moved.
    #[must_use]
    pub(crate) fn moved(self, name: &str, bytes: usize, at: At) -> Shader {
        match bytes {
            4 => self.buffer(name, DType::U32, at),
            2 => {
                let mut shader = self;
                shader.halves = true;
                if !shader.limits.halves {
                    shader.want("elements of 4 bytes: the device cannot read and write those of 2".into());
                }
                shader.binding(name, "u16", at);
                let _ = writeln!(
                    shader.declarations,
                    "fn get_{name}(nth: u32) -> u32 {{ return u32({name}[nth]); }}\nfn set_{name}(nth: u32, put: u32) {{ {name}[nth] = u16(put); }}"
                );
                shader
            }
            _one => {
                let mut shader = self;
                shader.binding(name, "atomic<u32>", at);
                // Bytes of a word belong to several threads; those of a result that is only moved begin as 0.
                let _ = writeln!(
                    shader.declarations,
                    "fn get_{name}(nth: u32) -> u32 {{ return (atomicLoad(&{name}[nth >> 2u]) >> (8u * (nth & 3u))) & 0xffu; }}\n\
                     fn set_{name}(nth: u32, put: u32) {{ atomicOr(&{name}[nth >> 2u], put << (8u * (nth & 3u))); }}"
                );
                shader
            }
        }
    }

    /// With `reject(value)`, which notes a value that the kernel rejects; the first one stays.
    #[must_use]
    pub(crate) fn rejecting(mut self) -> Shader {
        self.binding("fault", "atomic<i32>", At::Fault);
        self.declarations.push_str(
            "fn reject(found: i32) {\n    if (atomicCompareExchangeWeak(&fault[0], 0, i32(p.step)).exchanged) { \
             atomicStore(&fault[1], found); }\n}\n",
        );
        self.fields.push_str("    step: u32,\n");
        self.numbers.push(Number::Step);
        self
    }

    /// With `arrivals`, in whose first element a kernel counts its workgroups; and what others of these stored in the buffer `name` is seen
    /// by the last.
    #[must_use]
    pub(crate) fn arriving(mut self, name: &str) -> Shader {
        let declared = format!(" var<storage, read_write> {name}:");
        self.declarations = self.declarations.replace(&declared, &format!(" @coherent{declared}"));
        self.binding("arrivals", "atomic<u32>", At::Arrivals);
        self
    }

    /// With a number of type u32.
    #[must_use]
    pub(crate) fn number(mut self, name: &str, value: usize) -> Shader {
        let _ = writeln!(self.fields, "    {name}: u32,");
        match u32::try_from(value) {
            Ok(value) => self.numbers.push(Number::Word(value)),
            Err(_) => self.want(format!("{name} of at most {}, not {value}", u32::MAX)),
        }
        self
    }

    /// With a number of type f32.
    #[must_use]
    pub(crate) fn float(mut self, name: &str, value: f32) -> Shader {
        let _ = writeln!(self.fields, "    {name}: f32,");
        self.numbers.push(Number::Word(value.to_bits()));
        self
    }

    fn want(&mut self, wanted: String) {
        self.wanted.get_or_insert(wanted);
    }

    /// As an action over workgroups in a row, whose number may be any.
    ///
    /// # Errors
    /// What is wanted instead.
    pub(crate) fn line(self, groups: usize) -> Result<Action, String> {
        let across = self.limits.groups.min(groups.max(1));
        let down = groups.div_ceil(across);
        let mut shader = self.number("groups", groups);
        shader
            .declarations
            .push_str("fn group_of(at: vec3<u32>, all: vec3<u32>) -> u32 { return at.x + at.y * all.x; }\n");
        let main = "    let group = group_of(at, all);\n    if (group < p.groups) { kernel(group, thread); }\n";
        shader.action(main, [across, down, usize::from(groups > 0)])
    }

    /// As an action over workgroups along three axes.
    ///
    /// # Errors
    /// What is wanted instead.
    pub(crate) fn grid(self, groups: [usize; 3]) -> Result<Action, String> {
        self.action("    kernel(at, thread);\n", groups)
    }

    fn action(mut self, main: &str, groups: [usize; 3]) -> Result<Action, String> {
        let (limits, title) = (self.limits, self.title);
        if groups.iter().any(|&n| n > limits.groups) {
            let [x, y, z] = groups;
            self.want(format!(
                "sizes for which {title} has at most {} workgroups along each axis, not {x} x {y} x {z}",
                limits.groups
            ));
        }
        if self.buffers.len() > limits.buffers {
            self.want(format!("at most {} buffers of a kernel, not {}", limits.buffers, self.buffers.len()));
        }
        for at in &self.buffers {
            if let At::Scratch { bytes, .. } = *at
                && bytes > limits.range
            {
                self.wanted.get_or_insert(format!(
                    "scratch memory of at most {} bytes in one piece, not {bytes}",
                    limits.range
                ));
            }
        }
        if self.numbers.len() * 4 > NUMBER_BYTES as usize {
            self.want(format!("at most {NUMBER_BYTES} bytes of numbers, not {}", self.numbers.len() * 4));
        }
        if let Some(wanted) = self.wanted {
            return Err(wanted);
        }
        if self.fields.is_empty() {
            self.fields.push_str("    nothing: u32,\n");
        }
        let mut out = String::with_capacity(8192);
        if self.halves {
            out.push_str("enable wgpu_int16;\n");
        }
        if self.cooperative.is_some() {
            out.push_str("enable wgpu_cooperative_matrix;\n");
        }
        let _ = write!(out, "struct Numbers {{\n{}}}\nvar<immediate> p: Numbers;\n{}", self.fields, self.declarations);
        for header in &self.headers {
            out.push_str(text(header).unwrap_or_else(|| unreachable!("{header} is a file")));
        }
        let _ = write!(
            out,
            "{}\n@compute @workgroup_size({})\nfn main(@builtin(workgroup_id) at: vec3<u32>, @builtin(num_workgroups) all: vec3<u32>, \
             @builtin(local_invocation_index) thread: u32) {{\n{main}}}\n",
            self.body, self.threads
        );
        let source =
            Source { title: title.into(), text: out, buffers: self.buffers.len(), cooperative: self.cooperative };
        Ok(Action::Kernel(Kernel { source, buffers: self.buffers, numbers: self.numbers, groups }))
    }
}
