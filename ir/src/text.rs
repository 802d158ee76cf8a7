//! The text form of a graph, which parses back to an equal graph.
//!
//! ```text
//! moebius graph 1
//! %0 = input() {"name":"x","role":"feed","ty":{"dtype":"f32","shape":[2]}} : f32[2] @ "models/src/gpt.rs":12 "layers.0"
//! %1 = unary(%0) {"function":"exp"} : f32[2] @ "models/src/gpt.rs":13 ""
//! output "y" = %1
//! update %3 <- %7
//! ```
//! One node a line: results, op, operands, attributes as JSON, result types, the line that made it, its scope.

use std::borrow::Cow;
use std::fmt::Write;

use smallvec::SmallVec;

use crate::dtype::DType;
use crate::error::{Error, Result, Site};
use crate::graph::{Graph, Value};
use crate::ops::Op;
use crate::types::{Shape, TensorType};

const HEADER: &str = "moebius graph 1";

impl Graph {
    /// The graph as text.
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER}\n");
        let list = |values: &[Value]| values.iter().map(|v| format!("%{}", v.0)).collect::<Vec<_>>().join(", ");
        for node in self.nodes() {
            let types = node.results.iter().map(|&r| self.ty(r).to_string()).collect::<Vec<_>>().join(", ");
            let (results, operands) = (list(&node.results), list(&node.operands));
            let (name, attributes) = (node.op.name(), node.op.attributes());
            let (file, scope) = (quote(&node.site.file), quote(&node.scope));
            let line = node.site.line;
            let _ = writeln!(text, "{results} = {name}({operands}) {attributes} : {types} @ {file}:{line} {scope}");
        }
        for (name, value) in self.outputs() {
            let _ = writeln!(text, "output {} = %{}", quote(name), value.0);
        }
        for update in self.updates() {
            let _ = writeln!(text, "update %{} <- %{}", update.state.0, update.new.0);
        }
        text
    }

    /// The graph that `text` describes, checked by every op's shape rule.
    ///
    /// # Errors
    /// [`Error::Parse`] naming the line, what was wanted and what was found; or the error of the op that refuses.
    pub fn from_text(text: &str) -> Result<Graph> {
        let mut graph = Graph::new();
        let mut lines = text.lines().enumerate();
        match lines.next() {
            Some((_, HEADER)) => {}
            other => {
                let found = other.map_or("", |(_, l)| l);
                return Err(parse_error(1, format!("the header {HEADER:?}"), found));
            }
        }
        for (index, line) in lines {
            if line.trim().is_empty() {
                continue;
            }
            Scanner { graph: &mut graph, line: index + 1, rest: line }.line()?;
        }
        Ok(graph)
    }
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn parse_error(line: usize, wanted: impl Into<String>, found: &str) -> Error {
    Error::Parse { line, wanted: wanted.into(), found: found.chars().take(80).collect() }
}

struct Scanner<'g, 't> {
    graph: &'g mut Graph,
    line: usize,
    rest: &'t str,
}

impl<'t> Scanner<'_, 't> {
    fn fail<T>(&self, wanted: impl Into<String>) -> Result<T> {
        Err(parse_error(self.line, wanted, self.rest))
    }

    fn eat(&mut self, token: &str) -> bool {
        match self.rest.trim_start().strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        if self.eat(token) { Ok(()) } else { self.fail(format!("{token:?}")) }
    }

    fn word(&mut self) -> &'t str {
        let text = self.rest.trim_start();
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
        self.rest = &text[end..];
        &text[..end]
    }

    fn number<T: std::str::FromStr>(&mut self, wanted: &str) -> Result<T> {
        let before = self.rest;
        let word = self.word();
        word.parse().or_else(|_| {
            self.rest = before;
            self.fail(wanted)
        })
    }

    /// A value that is already defined.
    fn value(&mut self) -> Result<Value> {
        self.expect("%")?;
        let before = self.rest;
        let index: u32 = self.number("the number of a value")?;
        if (index as usize) < self.graph.value_count() {
            return Ok(Value(index));
        }
        self.rest = before;
        self.fail(format!("a value defined above, of which there are {}", self.graph.value_count()))
    }

    /// The JSON value at the start of the rest, as text.
    fn json(&mut self) -> Result<&'t str> {
        let text = self.rest.trim_start();
        let mut stream = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
        match stream.next() {
            Some(Ok(_)) => {
                let (json, rest) = text.split_at(stream.byte_offset());
                self.rest = rest;
                Ok(json)
            }
            Some(Err(_)) | None => self.fail("JSON"),
        }
    }

    fn string(&mut self) -> Result<String> {
        let before = self.rest;
        let json = self.json()?;
        serde_json::from_str(json).or_else(|_| {
            self.rest = before;
            self.fail("a string in quotes")
        })
    }

    fn ty(&mut self) -> Result<TensorType> {
        let before = self.rest;
        let Ok(dtype) = self.word().parse::<DType>() else {
            self.rest = before;
            return self.fail("an element type: f32, bf16, f16, i32, u32 or bool");
        };
        self.expect("[")?;
        let mut dims: Vec<usize> = Vec::new();
        if !self.eat("]") {
            loop {
                dims.push(self.number("an extent")?);
                if self.eat("]") {
                    break;
                }
                self.expect(",")?;
            }
        }
        Ok(TensorType::new(dtype, Shape::from(dims)))
    }

    fn line(&mut self) -> Result<()> {
        if self.eat("output") {
            let name = self.string()?;
            self.expect("=")?;
            let value = self.value()?;
            self.end()?;
            return self.graph.output(name, value);
        }
        if self.eat("update") {
            let state = self.value()?;
            self.expect("<-")?;
            let new = self.value()?;
            self.end()?;
            return self.graph.update(state, new);
        }
        self.node()
    }

    fn end(&self) -> Result<()> {
        if self.rest.trim().is_empty() { Ok(()) } else { self.fail("the end of the line") }
    }

    fn node(&mut self) -> Result<()> {
        let first = self.graph.value_count();
        let mut count = 0;
        loop {
            self.expect("%")?;
            let before = self.rest;
            let index: usize = self.number("the number of a value")?;
            if index != first + count {
                self.rest = before;
                return self.fail(format!("the next free value, %{}", first + count));
            }
            count += 1;
            if !self.eat(",") {
                break;
            }
        }
        self.expect("=")?;
        let before = self.rest;
        let name = self.word();
        self.expect("(")?;
        let mut operands: SmallVec<[Value; 4]> = SmallVec::new();
        if !self.eat(")") {
            loop {
                operands.push(self.value()?);
                if self.eat(")") {
                    break;
                }
                self.expect(",")?;
            }
        }
        let attributes = self.json()?;
        let op = match Op::parse(name, attributes) {
            Some(Ok(op)) => op,
            Some(Err(error)) => {
                return Err(parse_error(self.line, format!("attributes of {name} ({error})"), attributes));
            }
            None => return Err(parse_error(self.line, "an op", before.trim_start())),
        };
        self.expect(":")?;
        let mut types: Vec<TensorType> = Vec::new();
        loop {
            types.push(self.ty()?);
            if !self.eat(",") {
                break;
            }
        }
        self.expect("@")?;
        let file = self.string()?;
        self.expect(":")?;
        let line = self.number("a line number")?;
        let scope = self.string()?;
        self.end()?;
        let site = Site { file: Cow::Owned(file), line };
        let results = self.graph.push_scoped(op, &operands, site, scope.into())?;
        let inferred: Vec<TensorType> = results.iter().map(|&r| self.graph.ty(r).clone()).collect();
        let show = |types: &[TensorType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if results.len() != count || inferred != types {
            let wanted = format!("{} results of {name}: {}", inferred.len(), show(&inferred));
            return Err(parse_error(self.line, wanted, &format!("{count}: {}", show(&types))));
        }
        Ok(())
    }
}
