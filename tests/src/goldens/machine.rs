//! Running a graph by the engine on one device.

use std::collections::HashMap;
use std::sync::Arc;

use moebius::Engine;
use moebius_backends::Backend;
use moebius_ir::{DType, Graph, Tensor, Value};

use super::set::Problem;

/// An engine under a name.
pub struct Machine {
    /// What it runs on.
    pub name: String,
    engine: Engine,
}

impl Machine {
    /// The engine of a backend.
    pub fn new(name: impl Into<String>, backend: Arc<dyn Backend>) -> Machine {
        Machine { name: name.into(), engine: Engine::with_backend(backend) }
    }

    /// Compiles and runs `graph` once; gives its outputs, whatever their dtype. All inputs must be states or parameters.
    ///
    /// # Errors
    /// [`Problem::Engine`] if it is refused, [`Problem::Tensor`] for an input without a value.
    pub fn run(&self, sheet: &Sheet) -> Result<HashMap<String, Vec<f64>>, Problem> {
        let mut session = self.engine.session();
        let mut program = session.compile(&sheet.graph)?;
        for (name, tensor) in &sheet.inputs {
            session.write_bytes(name, &tensor.to_bytes())?;
        }
        session.run(&mut program)?;
        let mut outputs = HashMap::new();
        for (name, value) in sheet.graph.outputs() {
            let data = match sheet.graph.ty(*value).dtype {
                DType::F32 => program.output::<f32>(name)?.into_iter().map(f64::from).collect(),
                DType::I32 => program.output::<i32>(name)?.into_iter().map(f64::from).collect(),
                DType::U32 | DType::Bool | DType::Bf16 | DType::F16 => {
                    return Err(Problem::Size {
                        what: format!("dtype of the output {name}"),
                        wanted: "f32 or i32".into(),
                        found: sheet.graph.ty(*value).to_string(),
                    });
                }
            };
            outputs.insert(name.clone(), data);
        }
        Ok(outputs)
    }
}

/// A graph and the values of its inputs, all of them states or parameters.
#[derive(Default)]
pub struct Sheet {
    /// The graph.
    pub graph: Graph,
    /// The inputs by name.
    pub inputs: Vec<(String, Tensor)>,
}

impl Sheet {
    /// An input with its value, rounded to the dtype of its type.
    ///
    /// # Errors
    /// [`Problem::Graph`] for a second input of one name.
    pub fn input(&mut self, name: &str, value: Tensor) -> Result<Value, Problem> {
        let input = self.graph.state(name, value.ty.clone())?;
        self.inputs.push((name.to_owned(), value.rounded()));
        Ok(input)
    }

    /// An output in f32.
    ///
    /// # Errors
    /// [`Problem::Graph`] for a second output of one name.
    pub fn output(&mut self, name: &str, value: Value) -> Result<(), Problem> {
        let wide = match self.graph.ty(value).dtype {
            DType::F32 | DType::I32 => value,
            DType::Bf16 | DType::F16 | DType::U32 | DType::Bool => self.graph.cast(value, DType::F32)?,
        };
        Ok(self.graph.output(name, wide)?)
    }
}

/// The output of this name.
///
/// # Errors
/// [`Problem::Tensor`].
pub(super) fn output<'a>(outputs: &'a HashMap<String, Vec<f64>>, name: &str) -> Result<&'a [f64], Problem> {
    outputs.get(name).map(Vec::as_slice).ok_or_else(|| Problem::Tensor { tensor: name.into() })
}
