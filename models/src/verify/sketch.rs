//! A graph under construction together with the values of its inputs.

use std::collections::HashMap;

use moebius_ir::{DType, Graph, Result, Role, Shape, Tensor, TensorType, Value, gradients, philox};

/// The value of every input by name, each already rounded to its dtype.
pub type Inputs = HashMap<String, Tensor>;

/// A graph and its inputs' values, made side by side so that a case is one function.
pub struct Sketch {
    /// The graph so far.
    pub graph: Graph,
    /// The value of every input.
    pub inputs: Inputs,
    /// The dtype of the floats that the case leaves open.
    pub dtype: DType,
    /// The inputs that the gradient is taken of.
    pub wrt: Vec<(String, Value)>,
    /// The outputs whose weighted sum is the loss.
    pub differentiated: Vec<Value>,
    /// Every output is one op away from the inputs, so that its own dtype decides how exact it must be.
    pub direct: bool,
    seed: u32,
    key: u32,
}

impl Sketch {
    /// An empty sketch whose open floats are `dtype`.
    pub fn new(dtype: DType) -> Self {
        let (graph, inputs) = (Graph::new(), HashMap::new());
        Sketch { graph, inputs, dtype, wrt: Vec::new(), differentiated: Vec::new(), direct: true, seed: 1, key: 0 }
    }

    /// Other numbers for every key; 0 gives those of always.
    #[must_use]
    pub fn keyed(mut self, key: u32) -> Self {
        self.key = key;
        self
    }

    /// The same numbers as ever with another seed.
    #[must_use]
    pub fn seeded(mut self, seed: u32) -> Self {
        self.seed = seed;
        self
    }

    /// `n` standard normal numbers, other ones at each call.
    pub fn normals(&mut self, n: usize) -> Vec<f64> {
        self.seed += 1;
        philox::first_normals([self.seed, self.key.wrapping_add(7)], 0, n).into_iter().map(f64::from).collect()
    }

    /// An input with this value; floats are differentiated if `wrt`.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn input(&mut self, role: Role, ty: TensorType, data: Vec<f64>, wrt: bool) -> Result<Value> {
        let name = format!("x{}", self.inputs.len());
        self.named(&name, role, ty, data, wrt)
    }

    /// [`Sketch::input`] of a given name.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn named(&mut self, name: &str, role: Role, ty: TensorType, data: Vec<f64>, wrt: bool) -> Result<Value> {
        let value = match role {
            Role::Feed => self.graph.feed(name, ty)?,
            Role::Parameter => self.graph.parameter(name, ty)?,
            Role::State => self.graph.state(name, ty)?,
        };
        self.give(name, value, data, wrt);
        Ok(value)
    }

    /// The value of an input that other code made in the graph; floats are differentiated if `wrt`.
    ///
    /// # Panics
    /// If the number of elements is not that of the input: a bug of the case.
    pub fn give(&mut self, name: &str, input: Value, data: Vec<f64>, wrt: bool) {
        let ty = self.graph.ty(input).clone();
        self.inputs.insert(name.into(), Tensor::new(ty, data).rounded());
        if wrt {
            self.wrt.push((name.into(), input));
        }
    }

    /// A differentiated feed of the open dtype: standard normal numbers through `map`.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn float(&mut self, shape: impl Into<Shape>, map: impl Fn(f64) -> f64) -> Result<Value> {
        self.float_as(self.dtype, shape, map)
    }

    /// [`Sketch::float`] of this dtype.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn float_as(&mut self, dtype: DType, shape: impl Into<Shape>, map: impl Fn(f64) -> f64) -> Result<Value> {
        let ty = TensorType::new(dtype, shape);
        let mut data = self.normals(ty.elements());
        for x in &mut data {
            *x = map(*x);
        }
        self.input(Role::Feed, ty, data, true)
    }

    /// A feed that is not differentiated.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn fixed(&mut self, ty: TensorType, data: Vec<f64>) -> Result<Value> {
        self.input(Role::Feed, ty, data, false)
    }

    /// An i32 feed.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn ints(&mut self, shape: impl Into<Shape>, data: &[i32]) -> Result<Value> {
        self.fixed(TensorType::i32(shape), data.iter().map(|&v| f64::from(v)).collect())
    }

    /// An output that counts in the loss.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn out(&mut self, value: Value) -> Result<()> {
        self.differentiated.push(value);
        self.aux(value)
    }

    /// An output that carries no gradient.
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn aux(&mut self, value: Value) -> Result<()> {
        let name = format!("y{}", self.graph.outputs().len());
        self.graph.output(name, value)
    }

    /// Whether there is something to differentiate.
    pub fn differentiable(&self) -> bool {
        !self.wrt.is_empty() && !self.differentiated.is_empty()
    }

    /// Adds `loss = sum(weights * outputs)` with fixed random weights, and its gradients as outputs `d.NAME`. Returns the loss.
    ///
    /// # Errors
    /// As [`gradients`].
    #[track_caller]
    pub fn differentiate(&mut self) -> Result<Value> {
        let loss = self.loss()?;
        let values: Vec<Value> = self.wrt.iter().map(|&(_, v)| v).collect();
        let grads = gradients(&mut self.graph, loss, &values)?;
        for ((name, _), grad) in self.wrt.clone().iter().zip(grads) {
            self.graph.output(format!("d.{name}"), grad)?;
        }
        Ok(loss)
    }

    /// Adds the output `loss`; see [`Sketch::differentiate`].
    ///
    /// # Errors
    /// None in a correct case.
    #[track_caller]
    pub fn loss(&mut self) -> Result<Value> {
        let mut loss = self.graph.scalar(0.0)?;
        for value in self.differentiated.clone() {
            let ty = TensorType::f32(self.graph.ty(value).shape.clone());
            let weights = self.normals(ty.elements());
            let g = &mut self.graph;
            let weights = g.constant(ty, weights)?;
            let wide = g.cast(value, DType::F32)?;
            let weighted = g.mul(wide, weights)?;
            let sum = g.sum_all(weighted)?;
            loss = g.add(loss, sum)?;
        }
        self.graph.output("loss", loss)?;
        Ok(loss)
    }
}
