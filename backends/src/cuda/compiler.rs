//! NVRTC, NVIDIA's compiler for kernels, loaded at run time. It needs no GPU, so that kernels are checked anywhere.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::driver;
use super::error::{CudaError, Result};

type Program = *mut c_void;

/// The names NVRTC goes by, the newest first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// NVRTC, loaded.
pub struct Compiler {
    path: PathBuf,
    version: (i32, i32),
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

impl Compiler {
    /// The compiler of this machine, looked for once: the file that `MOEBIUS_NVRTC` names, if it names one; else on the loader's
    /// path, in the toolkit of `CUDA_PATH`, in `/usr/local/cuda`, and among the packages of Python environments. Of several, the first
    /// that is no newer than the driver, which could not load what it makes; where there is no driver, or none is that old, the first.
    ///
    /// # Errors
    /// [`CudaError::NoCompiler`] naming every place.
    pub fn find() -> Result<&'static Compiler> {
        static FOUND: OnceLock<Result<Compiler>> = OnceLock::new();
        let newest = || driver::load().and_then(|()| driver::version()).map_or(i32::MAX, |version| version / 1000);
        FOUND.get_or_init(|| Compiler::among(&candidates(), newest())).as_ref().map_err(Clone::clone)
    }

    /// The first of these files that is NVRTC and of a major version up to `newest`, else the first that is NVRTC.
    fn among(files: &[PathBuf], newest: i32) -> Result<Compiler> {
        let mut newer = None;
        for compiler in files.iter().filter_map(|file| Compiler::open(file).ok()) {
            if compiler.version.0 <= newest {
                return Ok(compiler);
            }
            newer.get_or_insert(compiler);
        }
        newer.ok_or_else(|| CudaError::NoCompiler {
            looked_for: files.iter().map(|f| f.display().to_string()).collect(),
        })
    }

    fn open(path: &Path) -> Result<Compiler, libloading::Error> {
        // SAFETY: NVRTC's initialisers have no conditions, and it stays loaded, so that its functions stay valid.
        unsafe {
            let library = libloading::Library::new(path)?;
            for part in built_ins(path) {
                // NVRTC asks for this part by name, which the loader knows once it is loaded from here. Where it cannot be,
                // NVRTC says so when it compiles.
                if let Ok(part) = libloading::Library::new(part) {
                    std::mem::forget(part);
                }
            }
            let version: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
                library.get(b"nvrtcVersion")?;
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            let compiler = Compiler {
                path: path.into(),
                version: (major, minor),
                error_string: *library.get(b"nvrtcGetErrorString")?,
                create: *library.get(b"nvrtcCreateProgram")?,
                compile: *library.get(b"nvrtcCompileProgram")?,
                destroy: *library.get(b"nvrtcDestroyProgram")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize")?,
                log: *library.get(b"nvrtcGetProgramLog")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize")?,
                cubin: *library.get(b"nvrtcGetCUBIN")?,
            };
            std::mem::forget(library);
            Ok(compiler)
        }
    }

    /// Its version, major and minor.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Machine code of `source` for `arch`, such as `sm_90a`.
    ///
    /// # Errors
    /// [`CudaError::Kernel`] with the compiler's log, naming the source `name`; [`CudaError::Compiler`] otherwise.
    pub fn compile(&self, name: &str, source: &str, arch: &str, options: &[&str]) -> Result<Vec<u8>> {
        let text = |text: &str| CString::new(text).unwrap_or_default();
        let (source, file) = (text(source), text(name));
        let options: Vec<CString> =
            [format!("--gpu-architecture={arch}").as_str()].iter().chain(options).map(|o| text(o)).collect();
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: all texts end in a zero byte and outlive the call; there are no headers.
        let made = unsafe {
            (self.create)(&mut program, source.as_ptr(), file.as_ptr(), 0, std::ptr::null(), std::ptr::null())
        };
        self.check("nvrtcCreateProgram", made)?;
        let guard = Guard { compiler: self, program };
        // SAFETY: the program was made above, the options are as many as is said and end in a zero byte.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        if compiled != 0 {
            let log = self.bytes(program, self.log_size, self.log).unwrap_or_default();
            let mut log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
            if log.is_empty() {
                log = self.words(compiled);
            }
            return Err(CudaError::Kernel { kernel: name.into(), arch: arch.into(), log });
        }
        let cubin = self.bytes(program, self.cubin_size, self.cubin);
        drop(guard);
        cubin
    }

    /// What a pair of functions, one for the size and one for the content, gives.
    fn bytes(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        content: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>> {
        let mut n = 0;
        // SAFETY: a live program and a valid pointer.
        self.check("asking for a size", unsafe { size(program, &mut n) })?;
        let mut bytes = vec![0u8; n];
        // SAFETY: the buffer has the size that was asked for.
        self.check("asking for a result", unsafe { content(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn words(&self, code: c_int) -> String {
        // SAFETY: gives a static text for any number.
        unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned()
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(CudaError::Compiler { call, text: self.words(code) }) }
    }
}

/// Destroys a program at the end of its use.
struct Guard<'a> {
    compiler: &'a Compiler,
    program: Program,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: made by this compiler, and not used afterwards.
        unsafe { (self.compiler.destroy)(&mut self.program) };
    }
}

/// The files beside NVRTC that it loads when it compiles. They are not found by name in a folder off the loader's path.
fn built_ins(nvrtc: &Path) -> Vec<PathBuf> {
    let Some(folder) = nvrtc.parent().filter(|p| !p.as_os_str().is_empty()) else { return Vec::new() };
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let is_part = |p: &PathBuf| {
        let name = p.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        name.starts_with("libnvrtc-builtins.so")
    };
    files.filter(is_part).collect()
}

/// Every file that may be NVRTC, in the order it is looked for.
fn candidates() -> Vec<PathBuf> {
    // Whoever names a file wants that one.
    if let Some(named) = std::env::var_os("MOEBIUS_NVRTC") {
        return vec![named.into()];
    }
    let mut files: Vec<PathBuf> = NAMES.iter().map(PathBuf::from).collect();
    let toolkit = std::env::var_os("CUDA_PATH").map(|p| PathBuf::from(p).join("lib64"));
    let mut folders: Vec<PathBuf> = toolkit.into_iter().chain(["/usr/local/cuda/lib64".into()]).collect();
    let home = std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local"));
    let environment = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let roots = environment.into_iter().chain(home).chain(["/usr/local".into(), "/usr".into(), "/opt/nvrtc".into()]);
    roots.for_each(|root| folders.extend(python_folders(&root)));
    for folder in folders {
        files.extend(NAMES.iter().map(|name| folder.join(name)));
    }
    files
}

/// The folders `ROOT/lib/python3*/{site,dist}-packages/nvidia/*/lib`.
fn python_folders(root: &Path) -> Vec<PathBuf> {
    let entries = |folder: PathBuf| -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
        found.sort();
        found
    };
    let python = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3"));
    let mut folders = Vec::new();
    for version in entries(root.join("lib")).into_iter().filter(python) {
        for packages in ["site-packages", "dist-packages"] {
            let parts = entries(version.join(packages).join("nvidia"));
            folders.extend(parts.into_iter().map(|p| p.join("lib")).filter(|p| p.is_dir()));
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_that_is_not_there_names_every_place() {
        let places = ["/nowhere/libnvrtc.so.13", "/nowhere/else/libnvrtc.so"].map(PathBuf::from);
        let Err(error) = Compiler::among(&places, i32::MAX) else { panic!("found a compiler nowhere") };
        let text = error.to_string();
        assert!(places.iter().all(|p| text.contains(&p.display().to_string())), "{text}");
        // A library that is something else is passed over.
        assert!(Compiler::among(&["libc.so.6".into()], i32::MAX).is_err());
    }

    #[test]
    fn packages_of_python_are_looked_through() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::create_dir_all(root.path().join("lib/other/site-packages/nvidia/cu13/lib")).unwrap();
        assert_eq!(python_folders(root.path()), [lib]);
    }

    #[test]
    fn an_error_in_a_kernel_comes_with_the_log() {
        let Ok(compiler) = Compiler::find() else { return };
        let error = compiler.compile("bad.cu", "extern \"C\" __global__ void f() { nonsense(); }", "sm_80", &[]);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("bad.cu") && text.contains("nonsense"), "{text}");
    }
}
