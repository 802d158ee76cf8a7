//! Students made from their teacher: fewer layers, and weights to begin with.

use moebius::Session;

use super::{DistillError, Teacher};
use crate::config::{Config, ModelConfig};
use crate::gpt::Parameter;

/// Of `count` things taken evenly out of `all` in order, number `i`: the first and the last stay.
fn evenly(i: usize, count: usize, all: usize) -> usize {
    // One alone is the last: the deepest.
    let (at, steps) = if count > 1 { (i, count - 1) } else { (1, 1) };
    (2 * at * (all - 1) + steps) / (2 * steps)
}

/// The teacher's configuration with `layers` layers and the experts that go with them: of a list with an entry for each MoE layer,
/// entries are taken evenly, so that the pyramid keeps its form. 24 layers with the entries 10 x 32, 2 x 64 become 21 with 8 x 32,
/// 2 x 64, as in DeepSpeed-MoE.
///
/// # Errors
/// [`DistillError::Layers`] for more layers than the teacher has, or none.
pub fn cut(teacher: &Config, layers: usize) -> Result<Config, DistillError> {
    let mut config = teacher.clone();
    let model = &mut config.model;
    if layers == 0 || layers > model.layers {
        return Err(DistillError::Layers { teacher: model.name.clone(), most: model.layers, found: layers });
    }
    model.name = format!("{}-l{layers}", model.name);
    model.layers = layers;
    let (count, all) = (layers / model.expert_interval.max(1), model.experts.len());
    if all > 1 {
        model.experts = (0..count).map(|i| model.experts[evenly(i, count, all)]).collect();
        if model.experts.is_empty() {
            model.experts = vec![1];
        }
    }
    Ok(config)
}

/// What a student begins with of its teacher: a parameter of the student, and the teacher's tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Inheritance {
    /// The student's parameter.
    pub parameter: Parameter,
    /// Name of the teacher's, with the same elements or, for positions, more of them.
    pub from: String,
}

/// The parameters that a student can begin with: everything outside of the layers, and for each layer what the nearest layer of the
/// teacher has in the same shape. Nearest is meant relative to the depth; only layers with as many experts are looked at, or all
/// if there is none, and then what is not of experts is taken (Switch Transformers begin a dense student so): a dense network is
/// taken from the residual network of an MoE layer.
///
/// # Errors
/// [`DistillError::Inheritance`] if width or heads differ.
pub fn inherit(student: &ModelConfig, teacher: &ModelConfig) -> Result<Vec<Inheritance>, DistillError> {
    for (key, wanted, found) in [
        ("model.width", teacher.width, student.width),
        ("model.heads", teacher.heads, student.heads),
        ("model.kv_heads", teacher.kv_heads(), student.kv_heads()),
    ] {
        if wanted != found {
            return Err(DistillError::Inheritance { teacher: teacher.name.clone(), key, wanted, found });
        }
    }
    let there: Vec<Parameter> = all(teacher);
    let find = |name: &str| there.iter().find(|p| p.name == name);
    let of_layer = nearest_layers(student, teacher);
    let mut inherited = Vec::new();
    for parameter in all(student) {
        let names: Vec<String> = match in_layer(&parameter.name) {
            None => vec![parameter.name.clone()],
            Some((layer, rest)) => {
                let at = |rest: &str| format!("layers.{}.{rest}", of_layer[layer]);
                let of_side = rest.strip_prefix("ffn.").map(|rest| at(&format!("moe.mlp.{rest}")));
                [Some(at(rest)), of_side].into_iter().flatten().collect()
            }
        };
        let fits = |p: &&Parameter| {
            let longer = parameter.name == "position.weight"
                && p.shape[1] == parameter.shape[1]
                && p.shape[0] >= parameter.shape[0];
            p.shape == parameter.shape || longer
        };
        if let Some(from) = names.iter().filter_map(|name| find(name)).find(fits) {
            inherited.push(Inheritance { from: from.name.clone(), parameter });
        }
    }
    Ok(inherited)
}

fn all(model: &ModelConfig) -> Vec<Parameter> {
    Parameter::list(model).into_iter().chain(Parameter::untrained(model)).collect()
}

/// `layers.N.REST`.
fn in_layer(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// For each layer of the student the nearest one of the teacher.
fn nearest_layers(student: &ModelConfig, teacher: &ModelConfig) -> Vec<usize> {
    let (own, of_teacher) = (student.experts_per_layer(), teacher.experts_per_layer());
    let (last, last_of_teacher) = (own.len().saturating_sub(1), of_teacher.len().saturating_sub(1));
    let nearest = |(layer, &experts): (usize, &usize)| {
        let distance = |other: &usize| (layer * last_of_teacher).abs_diff(other * last);
        let alike = (0..of_teacher.len()).filter(|&other| of_teacher[other] == experts).min_by_key(distance);
        alike.or_else(|| (0..of_teacher.len()).min_by_key(distance)).unwrap_or(0)
    };
    own.iter().enumerate().map(nearest).collect()
}

impl Teacher {
    /// Writes what the student inherits into its parameters in the session; how many tensors that were.
    ///
    /// # Errors
    /// As [`inherit`]; [`DistillError::Checkpoint`].
    pub fn endow(&mut self, student: &ModelConfig, session: &mut Session) -> Result<usize, DistillError> {
        let inherited = inherit(student, &self.config().model)?;
        for Inheritance { parameter, from } in &inherited {
            let values = self.tensor(from)?;
            session.write(&parameter.name, &values[..parameter.shape.elements()])?;
        }
        Ok(inherited.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_keeps_the_form_of_the_pyramid() {
        for (teacher, student) in [("350m-pr-moe-32-64", "350m-pr-moe-l21"), ("1.3b-pr-moe-64-128", "1.3b-pr-moe-l21")]
        {
            let cut = cut(&Config::preset(teacher).unwrap(), 21).unwrap();
            let paper = Config::preset(student).unwrap();
            assert_eq!((&cut.model.experts, cut.model.layers), (&paper.model.experts, 21));
            cut.validate().unwrap();
        }
        let tiny = Config::preset("tiny-pr-moe").unwrap();
        let of = |layers| cut(&tiny, layers).map(|c| (c.model.experts.clone(), c.validate().is_ok()));
        assert_eq!(of(4).unwrap(), (vec![4, 8], true));
        assert_eq!(of(3).unwrap(), (vec![8], true));
        assert_eq!(of(1).unwrap(), (vec![1], true));
        assert!(matches!(of(0), Err(DistillError::Layers { most: 4, found: 0, .. })));
        assert!(of(5).is_err());
    }

    #[test]
    fn a_student_inherits_from_the_nearest_layers() {
        let mut teacher = Config::preset("tiny-pr-moe").unwrap();
        for change in ["model.layers=8", "model.experts=[4,4,8,8]"] {
            teacher.set(change).unwrap();
        }
        let student = cut(&teacher, 6).unwrap().model;
        assert_eq!(student.experts, [4, 8, 8]);
        let inherited = inherit(&student, &teacher.model).unwrap();
        assert_eq!(inherited.len(), Parameter::list(&student).len(), "everything is there");
        let from = |name: &str| inherited.iter().find(|i| i.parameter.name == name).map(|i| i.from.as_str());
        assert_eq!(from("layers.0.ffn.up.weight"), Some("layers.0.ffn.up.weight"));
        assert_eq!(from("layers.1.moe.router.weight"), Some("layers.1.moe.router.weight"));
        assert_eq!(from("layers.3.moe.router.weight"), Some("layers.5.moe.router.weight"));
        assert_eq!(from("layers.5.moe.experts.up.weight"), Some("layers.7.moe.experts.up.weight"));

        // A dense student takes what is not of experts; the residual network is such a thing.
        let mut dense = student.clone();
        dense.experts = vec![1];
        let inherited = inherit(&dense, &teacher.model).unwrap();
        assert_eq!(inherited.len(), Parameter::list(&dense).len());
        let mut standard = teacher.clone();
        standard.set("model.mlp=standard").unwrap();
        standard.set("model.expert_interval=1").unwrap();
        standard.set("model.experts=[4]").unwrap();
        let inherited = inherit(&dense, &standard.model).unwrap();
        assert!(
            inherited.iter().all(|i| !i.from.contains("moe")) && inherited.len() == 4 + 6 * 8,
            "{}",
            inherited.len()
        );

        dense.width *= 2;
        let error = inherit(&dense, &teacher.model).unwrap_err();
        assert!(error.to_string().contains("model.width: wanted 128, found 256"), "{error}");
    }
}
