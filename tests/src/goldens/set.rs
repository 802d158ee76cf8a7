//! A set on disk: its index files and its tensors.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use moebius_ir::{DType, Tensor, TensorType};
use safetensors::SafeTensors;
use serde_json::Value as Json;

/// Why a case could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A file that cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file that is not what its name says.
    #[error("{path}: wanted {wanted}, found {found}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
        /// What it holds.
        found: String,
    },
    /// A directory without any index.
    #[error("{path}: wanted index.json or index_kd.json with cases, or a checkpoint, found none")]
    Empty {
        /// The directory.
        path: PathBuf,
    },
    /// The entry of a kind in an index is no list of cases.
    #[error("index: wanted a list of cases for `{kind}`")]
    NotAList {
        /// The kind.
        kind: String,
    },
    /// A kind of case this program does not know.
    #[error("unknown kind of case `{kind}`")]
    UnknownKind {
        /// The kind.
        kind: String,
    },
    /// A tensor of no case in the index.
    #[error("no case in the index owns the tensor {tensor}")]
    Stray {
        /// File and name.
        tensor: String,
    },
    /// A tensor that a case needs.
    #[error("tensor {tensor} is missing")]
    Tensor {
        /// Its name.
        tensor: String,
    },
    /// A field of a case.
    #[error("field `{field}`: wanted {wanted}, found {found}")]
    Field {
        /// Its name.
        field: String,
        /// What it should be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// Sizes that do not fit each other.
    #[error("{what}: wanted {wanted}, found {found}")]
    Size {
        /// Of what.
        what: String,
        /// The size that fits.
        wanted: String,
        /// The size there is.
        found: String,
    },
    /// The graph could not be built.
    #[error(transparent)]
    Graph(#[from] moebius_ir::Error),
    /// The engine refused it.
    #[error(transparent)]
    Engine(#[from] moebius::Error),
}

/// The fields of one case in an index.
#[derive(Clone, Copy)]
pub struct Fields<'a>(&'a Json);

impl<'a> Fields<'a> {
    /// The fields of this object.
    pub fn new(json: &'a Json) -> Self {
        Fields(json)
    }

    fn get<T>(&self, field: &str, wanted: &'static str, as_: impl Fn(&'a Json) -> Option<T>) -> Result<T, Problem> {
        let found = self.0.get(field);
        found.and_then(as_).ok_or_else(|| Problem::Field {
            field: field.into(),
            wanted,
            found: found.map_or_else(|| "nothing".into(), Json::to_string),
        })
    }

    /// A text.
    ///
    /// # Errors
    /// [`Problem::Field`], as all of these.
    pub fn text(&self, field: &str) -> Result<&'a str, Problem> {
        self.get(field, "a text", Json::as_str)
    }

    /// A number.
    ///
    /// # Errors
    /// [`Problem::Field`].
    pub fn number(&self, field: &str) -> Result<f64, Problem> {
        self.get(field, "a number", Json::as_f64)
    }

    /// A number of things.
    ///
    /// # Errors
    /// [`Problem::Field`].
    pub fn count(&self, field: &str) -> Result<usize, Problem> {
        self.get(field, "a whole number", |j| j.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// Yes or no.
    ///
    /// # Errors
    /// [`Problem::Field`].
    pub fn flag(&self, field: &str) -> Result<bool, Problem> {
        self.get(field, "true or false", Json::as_bool)
    }

    /// A list of numbers of things.
    ///
    /// # Errors
    /// [`Problem::Field`].
    pub fn counts(&self, field: &str) -> Result<Vec<usize>, Problem> {
        let all = |j: &Json| j.as_array()?.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect();
        self.get(field, "a list of whole numbers", all)
    }

    /// Whether the field is there and not null.
    pub fn has(&self, field: &str) -> bool {
        self.0.get(field).is_some_and(|j| !j.is_null())
    }
}

/// All files of a set.
pub struct Set {
    directory: PathBuf,
    kinds: Vec<(String, Json)>,
    tensors: HashMap<String, HashMap<String, Tensor>>,
    /// What the losses of the set give the load-balancing loss.
    pub aux_weight: f64,
}

impl Set {
    /// Reads the indices and tensor files of `directory`.
    ///
    /// # Errors
    /// [`Problem`] for a file that cannot be read, or if there is nothing to compare.
    pub fn read(directory: &Path) -> Result<Set, Problem> {
        let mut set =
            Set { directory: directory.into(), kinds: Vec::new(), tensors: HashMap::new(), aux_weight: f64::NAN };
        for index in ["index.json", "index_kd.json"] {
            let path = directory.join(index);
            if !path.exists() {
                continue;
            }
            let text = bytes(&path)?;
            let wrong = |found: String| Problem::Format { path: path.clone(), wanted: "an object in JSON", found };
            let json: Json = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
            let Json::Object(entries) = json else { return Err(wrong(json.to_string())) };
            for (key, entry) in entries {
                match key.as_str() {
                    // Where the set comes from.
                    "torch" | "deepspeed" | "megatron" | "note" => {}
                    "aux_weight_in_losses" => {
                        let found = entry.to_string();
                        set.aux_weight = entry.as_f64().ok_or_else(|| wrong(found))?;
                    }
                    _kind => set.kinds.push((key, entry)),
                }
            }
        }
        let mut files: Vec<String> = set.kinds.iter().map(|(kind, _)| kind.clone()).collect();
        files.extend(["gating", "layer", "ep", "kd", "ckpt_io"].map(String::from));
        for file in files {
            let path = directory.join(format!("{file}.safetensors"));
            if path.exists() && !set.tensors.contains_key(&file) {
                set.tensors.insert(file, tensors(&path)?);
            }
        }
        let cases = set.kinds.iter().any(|(_, list)| list.as_array().is_none_or(|l| !l.is_empty()));
        if !cases && !set.has_checkpoint() {
            return Err(Problem::Empty { path: directory.into() });
        }
        Ok(set)
    }

    /// Where it lies.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The lists of cases by kind.
    pub fn kinds(&self) -> &[(String, Json)] {
        &self.kinds
    }

    /// The tensors of `FILE.safetensors`, by name.
    pub fn file(&self, file: &str) -> Option<&HashMap<String, Tensor>> {
        self.tensors.get(file)
    }

    /// For a test: to change a tensor.
    pub fn file_mut(&mut self, file: &str) -> Option<&mut HashMap<String, Tensor>> {
        self.tensors.get_mut(file)
    }

    /// For a test: leaves only this case, with its tensors and those that all cases share.
    pub fn keep(&mut self, kind: &str, case: &str) {
        let named = |entry: &Json| entry.get("name").and_then(Json::as_str) == Some(case);
        self.kinds.retain(|(k, _)| k == kind);
        for list in self.kinds.iter_mut().filter_map(|(_, list)| list.as_array_mut()) {
            list.retain(named);
        }
        self.tensors.remove("ckpt_io");
        for (file, tensors) in &mut self.tensors {
            tensors.retain(|name, _| {
                let owner = name.split('/').next().unwrap_or_default();
                owner == "common" || (file == kind && owner == case)
            });
        }
        self.directory.clear();
    }

    /// Whether there is a checkpoint.
    pub fn has_checkpoint(&self) -> bool {
        self.directory.join("ckpt").exists() || self.tensors.contains_key("ckpt_io")
    }

    /// Tensors, as `FILE/NAME`, that belong to no case of the index.
    pub fn strays(&self) -> Vec<String> {
        let mut strays = Vec::new();
        for (file, tensors) in self.tensors.iter().filter(|(file, _)| *file != "ckpt_io") {
            let cases = self.kinds.iter().find(|(kind, _)| kind == file).and_then(|(_, list)| list.as_array());
            let cases: Vec<&str> =
                cases.into_iter().flatten().filter_map(|c| c.get("name").and_then(Json::as_str)).collect();
            let owned = |name: &str| {
                let owner = name.split('/').next().unwrap_or_default();
                owner == "common" || cases.contains(&owner)
            };
            strays.extend(tensors.keys().filter(|name| !owned(name)).map(|name| format!("{file}/{name}")));
        }
        strays.sort_unstable();
        strays
    }
}

/// The content of a file.
pub(super) fn bytes(path: &Path) -> Result<Vec<u8>, Problem> {
    std::fs::read(path).map_err(|source| Problem::File { path: path.into(), source })
}

fn tensors(path: &Path) -> Result<HashMap<String, Tensor>, Problem> {
    use safetensors::Dtype::{BF16, F16, F32, I32, I64};
    let content = bytes(path)?;
    let wrong = |found: String| Problem::Format { path: path.into(), wanted: "tensors in safetensors", found };
    let file = SafeTensors::deserialize(&content).map_err(|e| wrong(e.to_string()))?;
    let mut tensors = HashMap::new();
    for (name, view) in file.iter() {
        let shape = view.shape().to_vec();
        let same = [(F32, DType::F32), (I32, DType::I32), (BF16, DType::Bf16), (F16, DType::F16)];
        let tensor = if let Some(&(_, dtype)) = same.iter().find(|(stored, _)| *stored == view.dtype()) {
            Tensor::from_bytes(TensorType::new(dtype, shape), view.data())
        } else if view.dtype() == I64 {
            let data = view.data().chunks_exact(8);
            let long = |c: &[u8]| i64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]) as f64;
            Tensor::new(TensorType::i32(shape), data.map(long).collect())
        } else {
            return Err(wrong(format!("{name} of dtype {:?}", view.dtype())));
        };
        tensors.insert(name.to_owned(), tensor);
    }
    Ok(tensors)
}
