//! A compiled graph with memory of its own.

use std::sync::Arc;

use moebius_backends::{Executable, Instance};
use moebius_ir::{Plan, TensorType};

use crate::element::Element;
use crate::error::{Error, Result};

/// A graph ready to run, by [`crate::Session::run`].
pub struct Program {
    executable: Arc<dyn Executable>,
    instance: Box<dyn Instance>,
}

impl Program {
    pub(crate) fn new(executable: Arc<dyn Executable>) -> Result<Program> {
        let instance = executable.instantiate()?;
        Ok(Program { executable, instance })
    }

    pub(crate) fn instance(&mut self) -> &mut dyn Instance {
        self.instance.as_mut()
    }

    /// The plan it runs.
    pub fn plan(&self) -> &Plan {
        self.executable.plan()
    }

    /// Type of a feed or output.
    fn ty(&self, what: &'static str, name: &str) -> Result<&TensorType> {
        let graph = self.plan().graph();
        let (value, names) = match what {
            "feed" => (graph.input_named(name), graph.inputs()),
            _output => (graph.output_named(name), graph.outputs()),
        };
        let there = || names.iter().map(|(n, _)| n.clone()).collect();
        value.map(|v| graph.ty(v)).ok_or_else(|| Error::NoSuch { what, name: name.into(), there: there() })
    }

    fn check<T: Element>(&self, what: &'static str, name: &str) -> Result<usize> {
        let ty = self.ty(what, name)?;
        if ty.dtype != T::DTYPE {
            return Err(Error::ElementType { name: name.into(), ty: ty.clone(), found: T::DTYPE });
        }
        Ok(ty.elements())
    }

    /// Gives a feed its value for the following runs.
    ///
    /// # Errors
    /// [`Error::NoSuch`], [`Error::ElementType`], or [`Error::Backend`] for a wrong length.
    pub fn feed<T: Element>(&mut self, name: &str, elements: &[T]) -> Result<()> {
        self.check::<T>("feed", name)?;
        Ok(self.instance.write(name, bytemuck::cast_slice(elements))?)
    }

    /// Gives a feed of any dtype its value for the following runs, as little-endian, row-major bytes; a bool is one byte, 0
    /// or 1.
    ///
    /// # Errors
    /// [`Error::NoSuch`], or [`Error::Backend`] for a wrong length.
    pub fn feed_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.ty("feed", name)?;
        Ok(self.instance.write(name, bytes)?)
    }

    /// The bytes of an output of any dtype after the last run, as [`Program::feed_bytes`] takes them.
    ///
    /// # Errors
    /// [`Error::NoSuch`].
    pub fn output_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.ty("output", name)?.bytes()];
        self.instance.read(name, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies an output of the last run.
    ///
    /// # Errors
    /// [`Error::NoSuch`], [`Error::ElementType`].
    pub fn output<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); self.check::<T>("output", name)?];
        self.output_into(name, &mut elements)?;
        Ok(elements)
    }

    /// Copies an output of the last run into `elements`.
    ///
    /// # Errors
    /// [`Error::NoSuch`], [`Error::ElementType`], or [`Error::Backend`] for a wrong length.
    pub fn output_into<T: Element>(&self, name: &str, elements: &mut [T]) -> Result<()> {
        self.check::<T>("output", name)?;
        Ok(self.instance.read(name, bytemuck::cast_slice_mut(elements))?)
    }

    /// An output of one element.
    ///
    /// # Errors
    /// As [`Program::output_into`].
    pub fn scalar(&self, name: &str) -> Result<f32> {
        let mut value = [0.0f32];
        self.output_into(name, &mut value)?;
        Ok(value[0])
    }
}
