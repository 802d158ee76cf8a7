//! Running graphs on the backends of this machine.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use moebius_backends::cpu::Cpu;
#[cfg(feature = "cuda")]
use moebius_backends::cuda::Cuda;
#[cfg(feature = "vulkan")]
use moebius_backends::vulkan::{Choice, Vulkan};
use moebius_backends::{Backend, Instance, Result, Store};
use moebius_ir::{Graph, Role, Tensor, TensorType, passes};
use moebius_models::verify::{Inputs, device};

pub use moebius_models::verify::device::same_bits;

/// A backend under a name that tells the variants of one kind apart.
#[derive(Clone)]
pub struct Device {
    /// Kind and variant.
    pub name: &'static str,
    /// The backend.
    pub backend: Arc<dyn Backend>,
}

/// The CPU backend with memory checks.
///
/// # Panics
/// If the threads cannot be started.
pub fn cpu(threads: usize) -> Cpu {
    Cpu::new(Some(threads)).unwrap_or_else(|e| panic!("{e}")).with_checks(true)
}

/// Every backend that this machine can run, in each variant that must agree with the reference. `MOEBIUS_DEVICE=cpu`,
/// `MOEBIUS_DEVICE=cuda` or `MOEBIUS_DEVICE=vulkan` leaves only the variants of that kind.
///
/// # Panics
/// If a device that is asked for or there cannot be used.
pub fn devices() -> Vec<Device> {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    let all = DEVICES.get_or_init(|| {
        let mut all = vec![
            Device { name: "cpu, 1 thread", backend: Arc::new(cpu(1)) },
            Device { name: "cpu, 3 threads", backend: Arc::new(cpu(3)) },
            Device { name: "cpu, 3 threads, unchecked", backend: Arc::new(cpu(3).with_checks(false)) },
        ];
        all.extend(gpus());
        all.extend(vulkan());
        if let Ok(kind) = std::env::var("MOEBIUS_DEVICE") {
            all.retain(|d| d.backend.name() == kind);
            assert!(!all.is_empty(), "MOEBIUS_DEVICE={kind}: no such device here");
        }
        all
    });
    all.clone()
}

/// The first GPU, if there is one: step by step with checks on its memory, and as a recorded graph.
#[cfg(feature = "cuda")]
fn gpus() -> Vec<Device> {
    if !Cuda::count().is_ok_and(|n| n > 0) {
        return Vec::new();
    }
    let open = || Cuda::open(0).unwrap_or_else(|e| panic!("{e}"));
    vec![
        Device { name: "cuda, checked", backend: Arc::new(open().with_checks(true)) },
        Device { name: "cuda", backend: Arc::new(open()) },
    ]
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Vec<Device> {
    Vec::new()
}

/// The best device with a Vulkan driver, if there is one: step by step with checks on its memory, and as one sequence of commands. Left
/// out if another kind is asked for. The validation layer is between in `tests/tests/vulkan.rs`.
#[cfg(feature = "vulkan")]
fn vulkan() -> Vec<Device> {
    if std::env::var("MOEBIUS_DEVICE").is_ok_and(|kind| kind != "vulkan") || !Vulkan::count().is_ok_and(|n| n > 0) {
        return Vec::new();
    }
    let plain = Vulkan::open(&Choice::Best).unwrap_or_else(|e| panic!("{e}"));
    // The same device, so that each kernel is compiled once.
    let checked = plain.checked().unwrap_or_else(|| panic!("no checks"));
    vec![Device { name: "vulkan, checked", backend: checked }, Device { name: "vulkan", backend: Arc::new(plain) }]
}

#[cfg(not(feature = "vulkan"))]
fn vulkan() -> Vec<Device> {
    Vec::new()
}

/// A compiled graph with its memory and its stored tensors.
pub struct Live {
    instance: Box<dyn Instance>,
    /// Parameters and states.
    pub store: Box<dyn Store>,
    feeds: Vec<String>,
    states: Vec<(String, TensorType)>,
    outputs: Vec<(String, TensorType)>,
}

impl Live {
    /// Optimises, plans, compiles and instantiates `graph`.
    ///
    /// # Errors
    /// Whatever the backend refuses.
    pub fn new(backend: &dyn Backend, graph: &Graph) -> Result<Live> {
        let plan = backend.plan(passes::optimise(graph)?)?;
        assert_eq!(plan.overlap(), None, "buffers of a plan");
        let executable = backend.compile(plan)?;
        let mut store = backend.new_store();
        let role = |g: &Graph, v| g.input_of(v).map_or(Role::Feed, |i| i.role);
        let (mut feeds, mut states) = (Vec::new(), Vec::new());
        for (name, value) in graph.inputs() {
            if role(graph, *value) == Role::Feed {
                feeds.push(name.clone());
            } else {
                store.insert(name, graph.ty(*value))?;
                states.push((name.clone(), graph.ty(*value).clone()));
            }
        }
        let outputs = graph.outputs().iter().map(|(n, v)| (n.clone(), graph.ty(*v).clone())).collect();
        Ok(Live { instance: executable.instantiate()?, store, feeds, states, outputs })
    }

    /// The instance itself.
    pub fn instance(&mut self) -> (&mut dyn Instance, &mut dyn Store) {
        (self.instance.as_mut(), self.store.as_mut())
    }

    /// Sets all feeds and stored tensors, runs once, and gives all outputs, and the stored tensors as `state.NAME`.
    ///
    /// # Errors
    /// Whatever the backend refuses.
    pub fn run(&mut self, inputs: &Inputs) -> Result<HashMap<String, Tensor>> {
        for name in &self.feeds {
            self.instance.write(name, &inputs[name].to_bytes())?;
        }
        for (name, _) in &self.states {
            self.store.write(name, &inputs[name].to_bytes())?;
        }
        self.instance.run(self.store.as_mut())?;
        let mut results = HashMap::new();
        for (name, ty) in &self.outputs {
            let mut bytes = vec![0; ty.bytes()];
            self.instance.read(name, &mut bytes)?;
            results.insert(name.clone(), Tensor::from_bytes(ty.clone(), &bytes));
        }
        for (name, ty) in &self.states {
            results.insert(format!("state.{name}"), Tensor::from_bytes(ty.clone(), &self.store.bytes(name)?));
        }
        Ok(results)
    }
}

/// What [`Live::run`] should give, by the reference on the graph as it was built.
///
/// # Panics
/// If the inputs do not fit the graph.
pub fn reference(
    graph: &Graph,
    inputs: &Inputs,
    precision: moebius_ir::reference::Precision,
) -> HashMap<String, Tensor> {
    device::expected(graph, inputs, precision).unwrap_or_else(|e| panic!("{e}"))
}
