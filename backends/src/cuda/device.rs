//! One GPU: its context, the stream on which everything happens in order, and the kernels loaded so far.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cust::context::{Context, CurrentContext};
use cust::device::DeviceAttribute;
use cust::memory::LockedBuffer;
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::{CudaFlags, sys};

use super::chip::Chip;
use super::compiler::Compiler;
use super::driver::{self, Counter, check, failed};
use super::error::{CudaError, Result};
use super::source::Source;
use crate::cache::{Cache, Found};

/// A GPU that kernels can be loaded on.
pub(crate) struct Device {
    /// Its number, from 0.
    pub(crate) ordinal: usize,
    /// What it is called.
    pub(crate) name: String,
    /// Its compute capability, major and minor.
    pub(crate) capability: (i32, i32),
    /// Bytes of its memory.
    pub(crate) total: u64,
    /// What the lowering asks of it.
    pub(crate) chip: Chip,
    /// Whether a kernel is launched while the one before still runs.
    pub(crate) launches_early: bool,
    /// Calls of the driver.
    pub(crate) counter: Counter,
    modules: Mutex<HashMap<u128, Arc<Module>>>,
    notes: Mutex<Vec<String>>,
    compiler: &'static Compiler,
    cache: Cache,
    /// Held by whoever puts a sequence on the stream that nothing may come between, as while it is recorded.
    sequence: Mutex<()>,
    /// Memory of the host that the GPU writes to by itself. A copy to other memory the driver takes in pieces, and waits for each.
    landing: Mutex<LockedBuffer<u8>>,
    // Fields are dropped in this order: the context last.
    stream: Stream,
    context: Context,
}

/// Bytes of the memory that small results land in.
const LANDING: usize = 1 << 20;

/// A mutex that a panic elsewhere does not make useless: what it guards is replaced whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many GPUs the driver shows.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::OldDriver`], [`CudaError::Driver`].
pub(crate) fn count() -> Result<usize> {
    driver::load()?;
    match cust::init(CudaFlags::empty()) {
        Ok(()) => {}
        Err(cust::error::CudaError::NoDevice) => return Ok(0),
        Err(e) => return Err(failed("cuInit")(e)),
    }
    Ok(cust::device::Device::num_devices().map_err(failed("cuDeviceGetCount"))? as usize)
}

impl Device {
    /// The GPU of this number.
    ///
    /// # Errors
    /// [`CudaError::NoDevice`], [`CudaError::OldDevice`], [`CudaError::NoCompiler`] and those of [`count`].
    pub(crate) fn open(ordinal: usize) -> Result<Device> {
        let there = count()?;
        if ordinal >= there {
            return Err(CudaError::NoDevice { wanted: ordinal, there });
        }
        let device = cust::device::Device::get_device(ordinal as u32).map_err(failed("cuDeviceGet"))?;
        let name = device.name().map_err(failed("cuDeviceGetName"))?;
        let attribute = |a| device.get_attribute(a).map_err(failed("cuDeviceGetAttribute"));
        let capability =
            (attribute(DeviceAttribute::ComputeCapabilityMajor)?, attribute(DeviceAttribute::ComputeCapabilityMinor)?);
        if capability.0 < 8 {
            return Err(CudaError::OldDevice { name, found: capability });
        }
        let compiler = Compiler::find()?;
        let (newest, driver) = (compiler.version().0, driver::version()?);
        if newest > driver / 1000 {
            return Err(CudaError::OldDriver {
                wanted: format!("one for CUDA {newest}.0, as NVRTC is of that version ({})", compiler.path().display()),
                found: format!("one for CUDA {}", driver::spelled(driver)),
            });
        }
        let total = device.total_memory().map_err(failed("cuDeviceTotalMem"))? as u64;
        let processors = attribute(DeviceAttribute::MultiprocessorCount)?.max(2) as usize;
        let chip = Chip { hopper: capability == (9, 0) && driver::has_tensor_boxes(), processors };
        let launches_early = capability.0 >= 9 && driver::can_launch_early(driver);
        let context = Context::new(device).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(failed("cuStreamCreate"))?;
        let landing = LockedBuffer::new(&0, LANDING).map_err(failed("cuMemAllocHost"))?;
        Ok(Device {
            ordinal,
            name,
            capability,
            total,
            chip,
            launches_early,
            counter: Counter::default(),
            modules: Mutex::new(HashMap::new()),
            notes: Mutex::new(Vec::new()),
            compiler,
            cache: Cache::of_user("cubin"),
            sequence: Mutex::new(()),
            landing: Mutex::new(landing),
            stream,
            context,
        })
    }

    /// Makes the GPU's context that of this thread.
    pub(crate) fn enter(&self) -> Result<()> {
        CurrentContext::set_current(&self.context).map_err(failed("cuCtxSetCurrent"))
    }

    /// Keeps the stream for a sequence of calls.
    pub(crate) fn hold(&self) -> MutexGuard<'_, ()> {
        lock(&self.sequence)
    }

    /// The stream, for the driver's functions.
    pub(crate) fn raw_stream(&self) -> sys::CUstream {
        self.stream.as_inner()
    }

    /// The stream.
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Waits until everything on the stream is done.
    pub(crate) fn synchronize(&self) -> Result<()> {
        Counter::count(&self.counter.synchronisations);
        self.stream.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    /// Bytes that are free now.
    pub(crate) fn free(&self) -> Result<u64> {
        self.enter()?;
        Ok(cust::memory::mem_get_info().map_err(failed("cuMemGetInfo"))?.0 as u64)
    }

    /// The architecture that kernels are compiled for: with the features of this very chip where it has such.
    pub(crate) fn architecture(&self) -> String {
        architecture(self.capability)
    }

    /// The compiler's version, major and minor.
    pub(crate) fn compiler_version(&self) -> (i32, i32) {
        self.compiler.version()
    }

    /// What happened that did not stop anything, such as a damaged entry of the cache, since this was last asked.
    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.notes))
    }

    /// Machine code of a source, from the cache or from the compiler.
    fn code(&self, source: &Source, key: u128) -> Result<Vec<u8>> {
        match self.cache.get(key) {
            Found::Code(code) => return Ok(code),
            Found::Nothing => {}
            Found::Damaged(why) => lock(&self.notes).push(format!("a compiled kernel is damaged and made anew: {why}")),
        }
        let code = self.compiler.compile(&source.title(), &source.text(), &self.architecture(), source.options())?;
        if let Err(e) = self.cache.put(key, &code) {
            let note = format!("compiled kernels cannot be kept for the next time: {e}");
            let mut notes = lock(&self.notes);
            if !notes.contains(&note) {
                notes.push(note);
            }
        }
        Ok(code)
    }

    /// The modules of all these sources, in their order. Those not loaded yet are compiled side by side.
    pub(crate) fn modules(&self, sources: &[&Source]) -> Result<Vec<Arc<Module>>> {
        use rayon::prelude::*;
        let version = format!("{:?}", self.compiler.version());
        let arch = self.architecture();
        let key = |s: &Source| Cache::key(&[&s.text(), &s.options().join(" "), &arch, &version]);
        let keys: Vec<u128> = sources.iter().map(|s| key(s)).collect();
        let mut missing: Vec<usize> = {
            let loaded = lock(&self.modules);
            (0..keys.len()).filter(|&i| !loaded.contains_key(&keys[i])).collect()
        };
        missing.sort_by_key(|&i| keys[i]);
        missing.dedup_by_key(|&mut i| keys[i]);
        let codes: Vec<(usize, Vec<u8>)> =
            missing.par_iter().map(|&i| Ok((i, self.code(sources[i], keys[i])?))).collect::<Result<_>>()?;
        self.enter()?;
        for (i, code) in codes {
            let module = Module::from_cubin(code, &[]).map_err(failed("cuModuleLoadDataEx"))?;
            lock(&self.modules).entry(keys[i]).or_insert_with(|| Arc::new(module));
        }
        let loaded = lock(&self.modules);
        Ok(keys.iter().map(|k| Arc::clone(&loaded[k])).collect())
    }

    /// Sets `bytes` bytes from `at` on, in the order of the stream.
    pub(crate) fn fill(&self, at: u64, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: callers give ranges inside their own memory.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(at, value, bytes, self.raw_stream()) })
    }

    /// Copies on the GPU, in the order of the stream.
    pub(crate) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 || from == to {
            return Ok(());
        }
        // SAFETY: callers give ranges inside memory they own or have located.
        check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.raw_stream()) })
    }

    /// Copies from the host and waits for it.
    pub(crate) fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.upload_later(to, bytes)?;
        self.synchronize()
    }

    /// Copies from the host, in the order of the stream; `bytes` must stay as they are until then.
    pub(crate) fn upload_later(&self, to: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let from = bytes.as_ptr().cast();
        // SAFETY: callers give a range inside their own memory.
        check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes.len(), self.raw_stream()) })
    }

    /// Copies to the host and waits for it.
    pub(crate) fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.download_all([(from, bytes)])
    }

    /// Copies several stretches to the host and waits once for them all.
    pub(crate) fn download_all<const N: usize>(&self, mut stretches: [(u64, &mut [u8]); N]) -> Result<()> {
        let mut landing = lock(&self.landing);
        let lands = stretches.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() <= LANDING;
        let (mut all, mut at) = (Ok(()), 0);
        for (from, bytes) in &mut stretches {
            let landed = if lands { &mut landing.as_mut_slice()[at..at + bytes.len()] } else { &mut **bytes };
            at += landed.len();
            if all.is_ok() && !landed.is_empty() {
                let to = landed.as_mut_ptr().cast();
                // SAFETY: callers give a range inside their own memory, and what is written to outlives the wait below.
                let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to, *from, landed.len(), self.raw_stream()) };
                all = check("cuMemcpyDtoHAsync", copied);
            }
        }
        // Also after a failure: the copies before it may still be under way.
        self.synchronize().and(all)?;
        if lands {
            let mut landed = landing.as_slice();
            for (_, bytes) in stretches {
                let (now, rest) = landed.split_at(bytes.len());
                bytes.copy_from_slice(now);
                landed = rest;
            }
        }
        Ok(())
    }
}

/// The architecture of a compute capability, as the compiler names it.
fn architecture((major, minor): (i32, i32)) -> String {
    format!("sm_{major}{minor}{}", if (major, minor) == (9, 0) { "a" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_are_those_of_the_compiler() {
        assert_eq!([(8, 0), (8, 9), (9, 0)].map(architecture), ["sm_80", "sm_89", "sm_90a"]);
    }

    #[test]
    fn a_gpu_that_is_not_there_is_a_typed_error() {
        let Err(error) = Device::open(1000) else { panic!("a thousand GPUs") };
        let known = matches!(
            error,
            CudaError::NoDriver { .. }
                | CudaError::NoDevice { .. }
                | CudaError::OldDriver { .. }
                | CudaError::Driver { .. }
        );
        assert!(known && !error.to_string().is_empty(), "{error}");
    }
}
