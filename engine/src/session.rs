//! Parameters and state on a device, and the programs that work on them.

use std::borrow::Cow;

use half::{bf16, f16};
use moebius_backends::Store;
use moebius_ir::{DType, Graph, Role, TensorType, passes};

use crate::checkpoint::{Dtype, TensorFile};
use crate::element::Element;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::program::Program;

/// Time that the uses of one op took in a run.
#[derive(Clone, Debug, PartialEq)]
pub struct StepTime {
    /// The op.
    pub op: &'static str,
    /// Type of its first result.
    pub result: TensorType,
    /// Whether these uses belong to the backward pass.
    pub backward: bool,
    /// Seconds of one run, all uses together.
    pub seconds: f64,
    /// How many uses.
    pub count: usize,
}

/// Named tensors on a device. Programs compiled in one session share them.
pub struct Session {
    engine: Engine,
    store: Box<dyn Store>,
    writes: u64,
}

impl Session {
    pub(crate) fn new(engine: Engine) -> Session {
        let store = engine.backend().new_store();
        Session { engine, store, writes: 0 }
    }

    /// The device.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Optimises, plans and compiles `graph`. Parameters and states that the session does not hold yet are added as zeros.
    ///
    /// # Errors
    /// [`Error::Graph`] or [`Error::Backend`] if the graph is refused; [`moebius_backends::Error::TooLarge`] if the device has
    /// not enough memory for it, before any is taken; [`moebius_backends::Error::StoredType`] if the session
    /// holds a tensor of that name and another type.
    pub fn compile(&mut self, graph: &Graph) -> Result<Program> {
        let backend = self.engine.backend();
        let plan = backend.plan(passes::optimise(graph)?)?;
        let new = plan.graph().inputs().iter().filter(|(name, _)| self.store.ty(name).is_none()).map(|(_, v)| *v);
        let kept = new.filter(|v| plan.graph().input_of(*v).is_some_and(|i| i.role != Role::Feed));
        let state: u64 = kept.map(|v| plan.graph().ty(v).bytes() as u64).sum();
        let arena = plan.arena_bytes() as u64;
        if let Some(free) = backend.free_memory().filter(|free| state.saturating_add(arena) > *free) {
            return Err(moebius_backends::Error::TooLarge { backend: backend.name(), state, arena, free }.into());
        }
        for (name, value) in plan.graph().inputs() {
            if plan.graph().input_of(*value).is_none_or(|i| i.role == Role::Feed) {
                continue;
            }
            let wanted = plan.graph().ty(*value);
            match self.store.ty(name) {
                None => self.store.insert(name, wanted)?,
                Some(found) if found == wanted => {}
                Some(found) => {
                    let (name, wanted, found) = (name.clone(), wanted.clone(), found.clone());
                    return Err(moebius_backends::Error::StoredType { name, wanted, found }.into());
                }
            }
        }
        Program::new(backend.compile(plan)?)
    }

    /// [`Session::compile`] for a graph whose parameters are not trained any more: one that the graph reads in a single narrower
    /// float alone is kept in that dtype, so that it takes less memory and is not converted in every run. Give such
    /// parameters their values by [`Session::write_rounded`]; results have the bits they would have with wider ones.
    ///
    /// # Errors
    /// As [`Session::compile`].
    pub fn compile_frozen(&mut self, graph: &Graph) -> Result<Program> {
        self.compile(&passes::narrow_parameters(graph)?)
    }

    /// Runs a program of this session once.
    ///
    /// # Errors
    /// [`Error::Backend`] if the session does not hold what the program wants or a kernel rejects a value.
    pub fn run(&mut self, program: &mut Program) -> Result<()> {
        Ok(program.instance().run(self.store.as_mut())?)
    }

    /// Runs a program of this session so many times, one run after another. Devices that are given work in portions, as a GPU under
    /// Vulkan, get several runs in one.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn run_times(&mut self, program: &mut Program, times: usize) -> Result<()> {
        Ok(program.instance().run_times(self.store.as_mut(), times)?)
    }

    /// Runs a program step by step and finds the first tensor that is not finite.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn first_non_finite(&mut self, program: &mut Program) -> Result<Option<moebius_backends::NonFinite>> {
        Ok(program.instance().first_non_finite(self.store.as_mut())?)
    }

    /// Runs a program `runs` times and adds up the time of each kind of step: an op and its result's type; see [`StepTime`].
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn profile(&mut self, program: &mut Program, runs: usize) -> Result<Vec<StepTime>> {
        let mut total: Vec<StepTime> = Vec::new();
        for _ in 0..runs {
            let times = program.instance().profile(self.store.as_mut())?;
            let graph = program.plan().graph();
            for (id, seconds) in times {
                let node = graph.node(id);
                let (op, result) = (node.op.name(), graph.ty(node.results[0]));
                let backward = node.scope.starts_with("backward");
                match total.iter_mut().find(|t| t.op == op && t.backward == backward && t.result == *result) {
                    Some(time) => {
                        time.seconds += seconds;
                        time.count += 1;
                    }
                    None => total.push(StepTime { op, result: result.clone(), backward, seconds, count: 1 }),
                }
            }
        }
        for time in &mut total {
            time.seconds /= runs as f64;
            time.count /= runs;
        }
        total.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(total)
    }

    /// How often tensors were added, dropped or written by the host.
    pub(crate) fn writes(&self) -> u64 {
        self.writes
    }

    /// The store, to change it.
    fn change(&mut self) -> &mut dyn Store {
        self.writes += 1;
        self.store.as_mut()
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        self.store.names()
    }

    /// Type of a tensor.
    pub fn ty(&self, name: &str) -> Option<&TensorType> {
        self.store.ty(name)
    }

    /// Adds a zeroed tensor, replacing one of the same name.
    ///
    /// # Errors
    /// [`Error::Backend`] if the device has no room.
    pub fn insert(&mut self, name: &str, ty: &TensorType) -> Result<()> {
        Ok(self.change().insert(name, ty)?)
    }

    /// Drops a tensor and its memory; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        self.change().remove(name)
    }

    /// Overwrites a tensor.
    ///
    /// # Errors
    /// [`Error::ElementType`] if `elements` are of another dtype; [`Error::Backend`] for an unknown name or a wrong length.
    pub fn write<T: Element>(&mut self, name: &str, elements: &[T]) -> Result<()> {
        self.check::<T>(name)?;
        Ok(self.change().write(name, bytemuck::cast_slice(elements))?)
    }

    /// A copy of a tensor's elements.
    ///
    /// # Errors
    /// [`Error::ElementType`] if it is of another dtype; [`Error::Backend`] for an unknown name.
    pub fn read<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        self.check::<T>(name)?;
        let bytes = self.store.bytes(name)?;
        let mut elements = vec![T::zeroed(); bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut elements).copy_from_slice(&bytes);
        Ok(elements)
    }

    /// Overwrites a tensor with little-endian, row-major bytes.
    ///
    /// # Errors
    /// [`Error::Backend`] for an unknown name or a wrong length.
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.change().write(name, bytes)?)
    }

    /// Overwrites a tensor of any float dtype, rounding to nearest even.
    ///
    /// # Errors
    /// [`Error::ElementType`] if the tensor does not hold floats; [`Error::Backend`] for an unknown name or a wrong length.
    pub fn write_rounded(&mut self, name: &str, values: &[f32]) -> Result<()> {
        match self.store.ty(name).map(|ty| ty.dtype) {
            Some(DType::Bf16) => {
                let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
                self.write(name, &rounded)
            }
            Some(DType::F16) => {
                let rounded: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                self.write(name, &rounded)
            }
            Some(DType::F32 | DType::I32 | DType::U32 | DType::Bool) | None => self.write(name, values),
        }
    }

    /// Overwrites a tensor with the one of the same name in a file, piece by piece: no more of it than 1 MiB is in memory beside
    /// the tensor itself. An f32 tensor in the file may be a narrower float here and is rounded to nearest even; other dtypes must
    /// be the same.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the file has no such tensor, cannot be read or is damaged, whereupon what the session holds must
    /// not be used; [`Error::LoadedType`] for another shape or a dtype that is not converted; [`Error::Backend`] for an unknown name.
    pub fn load(&mut self, name: &str, file: &mut TensorFile) -> Result<()> {
        self.load_from(name, name, file)
    }

    /// [`Session::load`] of the tensor that the file has by the name `from`.
    ///
    /// # Errors
    /// As [`Session::load`].
    pub fn load_from(&mut self, name: &str, from: &str, file: &mut TensorFile) -> Result<()> {
        let there = || moebius_backends::Error::NoSuch {
            what: "stored tensor",
            name: name.into(),
            there: self.store.names().into_iter().map(str::to_owned).collect(),
        };
        let wanted = self.store.ty(name).cloned().ok_or_else(there)?;
        let found = file.info(from).map(|info| (info.dtype, info.shape.clone()));
        let narrowed = match found {
            Some((dtype, shape)) if *wanted.shape == *shape => match (dtype, wanted.dtype) {
                (Dtype::F32, DType::Bf16) => Some(Narrow::Bf16),
                (Dtype::F32, DType::F16) => Some(Narrow::F16),
                (found, dtype) if found == Dtype::from(dtype) => None,
                (found, _) => return Err(loaded_type(name, wanted, found, &shape)),
            },
            Some((dtype, shape)) => return Err(loaded_type(name, wanted, dtype, &shape)),
            // The file says what it has.
            None => None,
        };
        let mut staging: Vec<u8> = Vec::new();
        let store = self.change();
        file.load_chunks(from, |at, bytes| {
            let Some(narrow) = narrowed else { return Ok(store.write_part(name, at as usize, bytes)?) };
            // Pieces begin and end at whole elements, as their length is a multiple of 4.
            staging.clear();
            for element in bytes.chunks_exact(4) {
                let value = f32::from_le_bytes([element[0], element[1], element[2], element[3]]);
                staging.extend_from_slice(&narrow.round(value));
            }
            Ok(store.write_part(name, at as usize / 2, &staging)?)
        })?;
        Ok(())
    }

    /// The bytes of a tensor, without a copy where the device's memory is the host's.
    ///
    /// # Errors
    /// [`Error::Backend`] for an unknown name.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        Ok(self.store.bytes(name)?)
    }

    fn check<T: Element>(&self, name: &str) -> Result<()> {
        match self.store.ty(name) {
            Some(ty) if ty.dtype != T::DTYPE => {
                Err(Error::ElementType { name: name.into(), ty: ty.clone(), found: T::DTYPE })
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// A float of 16 bits that an f32 is rounded to.
#[derive(Clone, Copy)]
enum Narrow {
    Bf16,
    F16,
}

impl Narrow {
    fn round(self, value: f32) -> [u8; 2] {
        match self {
            Narrow::Bf16 => bf16::from_f32(value).to_le_bytes(),
            Narrow::F16 => f16::from_f32(value).to_le_bytes(),
        }
    }
}

fn loaded_type(name: &str, wanted: TensorType, found: Dtype, shape: &[usize]) -> Error {
    Error::LoadedType { name: name.into(), wanted, found: format!("{found}{shape:?}") }
}
