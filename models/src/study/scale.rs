//! How large the models of the studies are.

use crate::config::{Config, ConfigError, Mlp};
use crate::distill;

use super::{Arm, Training};

/// How large the models are, and how long they are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Seconds on two cores; shows that the machinery works.
    Smoke,
    /// Minutes on two cores: models of half a million active parameters.
    Cpu,
    /// Minutes on a large GPU: models of about 20 million active parameters.
    Gpu,
}

/// The numbers of experts, layer by layer, of the arms of a scale.
struct Experts {
    uniform: &'static [usize],
    first: &'static [usize],
    second: &'static [usize],
    pyramid: &'static [usize],
    many: &'static [usize],
    /// A residual pyramid with about a third of the parameters of `many`.
    pr: &'static [usize],
}

impl Scale {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scale::Smoke => "smoke",
            Scale::Cpu => "cpu",
            Scale::Gpu => "gpu",
        }
    }

    /// Seeds where nothing else is said.
    pub fn seeds(self) -> usize {
        match self {
            Scale::Smoke => 2,
            Scale::Cpu | Scale::Gpu => 3,
        }
    }

    /// Training steps that are timed, and tokens that are decoded.
    pub(super) fn timed(self) -> (usize, usize) {
        match self {
            Scale::Smoke => (2, 4),
            Scale::Cpu => (10, 64),
            Scale::Gpu => (30, 128),
        }
    }

    fn experts(self) -> Experts {
        match self {
            Scale::Smoke => Experts {
                uniform: &[4],
                first: &[8, 8, 1, 1],
                second: &[1, 1, 8, 8],
                pyramid: &[2, 2, 4, 8],
                many: &[12],
                pr: &[2, 2, 2, 4],
            },
            Scale::Cpu => Experts {
                uniform: &[8],
                first: &[16, 16, 1, 1],
                second: &[1, 1, 16, 16],
                pyramid: &[4, 4, 8, 16],
                many: &[16],
                pr: &[2, 2, 4, 8],
            },
            Scale::Gpu => Experts {
                uniform: &[16],
                first: &[32, 32, 32, 1, 1, 1],
                second: &[1, 1, 1, 32, 32, 32],
                pyramid: &[8, 8, 8, 16, 24, 32],
                many: &[32],
                pr: &[6, 6, 6, 6, 12, 12],
            },
        }
    }

    fn base(self) -> Result<Config, ConfigError> {
        let (text, origin) = match self {
            Scale::Smoke => (include_str!("scales/smoke.toml"), "study/scales/smoke.toml"),
            Scale::Cpu => (include_str!("scales/cpu.toml"), "study/scales/cpu.toml"),
            Scale::Gpu => (include_str!("scales/gpu.toml"), "study/scales/gpu.toml"),
        };
        Config::from_toml(text, origin)
    }

    /// Width and heads of the smaller and the larger dense model.
    fn widths(self) -> [(usize, usize); 2] {
        match self {
            Scale::Smoke => [(16, 1), (48, 3)],
            Scale::Cpu => [(64, 2), (160, 5)],
            Scale::Gpu => [(256, 4), (640, 10)],
        }
    }
}

/// The arms that a scale has; studies choose among them.
pub(super) struct Zoo {
    scale: Scale,
    base: Config,
}

impl Zoo {
    /// # Errors
    /// [`ConfigError`] if a scale's file is wrong.
    pub(super) fn new(scale: Scale) -> Result<Zoo, ConfigError> {
        Ok(Zoo { scale, base: scale.base()? })
    }

    fn arm(&self, name: &'static str, change: impl FnOnce(&mut Config)) -> Arm {
        let mut config = self.base.clone();
        config.model.name = name.to_owned();
        change(&mut config);
        Arm::plain(name, config)
    }

    fn sparse(&self, name: &'static str, experts: fn(&Experts) -> &'static [usize], mlp: Mlp) -> Arm {
        self.arm(name, |config| {
            config.model.experts = experts(&self.scale.experts()).to_vec();
            config.model.mlp = mlp;
        })
    }

    fn dense_of(&self, name: &'static str, (width, heads): (usize, usize)) -> Arm {
        self.arm(name, |config| (config.model.width, config.model.heads) = (width, heads))
    }

    pub(super) fn dense(&self) -> Arm {
        self.arm("dense", |_| ())
    }

    pub(super) fn dense_small(&self) -> Arm {
        self.dense_of("dense-small", self.scale.widths()[0])
    }

    pub(super) fn dense_large(&self) -> Arm {
        self.dense_of("dense-large", self.scale.widths()[1])
    }

    /// As many experts in every MoE layer, top-1.
    pub(super) fn uniform(&self) -> Arm {
        self.sparse("uniform", |e| e.uniform, Mlp::Standard)
    }

    pub(super) fn first_half(&self) -> Arm {
        self.sparse("first-half", |e| e.first, Mlp::Standard)
    }

    pub(super) fn second_half(&self) -> Arm {
        self.sparse("second-half", |e| e.second, Mlp::Standard)
    }

    pub(super) fn pyramid(&self) -> Arm {
        self.sparse("pyramid", |e| e.pyramid, Mlp::Standard)
    }

    /// [`Zoo::uniform`] with two experts for each token.
    pub(super) fn top2(&self) -> Arm {
        let arm = self.uniform();
        self.arm("top-2", |config| (config.model.experts, config.model.top_k) = (arm.config.model.experts, Some(2)))
    }

    /// [`Zoo::uniform`] with a dense network beside the experts.
    pub(super) fn residual(&self) -> Arm {
        self.sparse("residual-top-1", |e| e.uniform, Mlp::Residual)
    }

    /// The MoE that PR-MoE is held against.
    pub(super) fn moe(&self) -> Arm {
        self.sparse("moe", |e| e.many, Mlp::Standard)
    }

    pub(super) fn pr_moe(&self) -> Arm {
        self.sparse("pr-moe", |e| e.pr, Mlp::Residual)
    }

    /// The student of [`Zoo::pr_moe`], trained without it: an eighth of the layers is cut off, as 24 become 21, but at least one with
    /// its experts.
    ///
    /// # Errors
    /// [`distill::DistillError`] if it cannot be cut.
    pub(super) fn student(&self) -> Result<Arm, distill::DistillError> {
        let teacher = self.pr_moe().config;
        let interval = teacher.model.expert_interval;
        let layers = teacher.model.layers - (teacher.model.layers / 8).next_multiple_of(interval).max(interval);
        let mut config = distill::cut(&teacher, layers)?;
        config.model.name = "student".to_owned();
        Ok(Arm::plain("student", config))
    }

    /// The student of [`Zoo::pr_moe`] that follows it for a part of its run.
    ///
    /// # Errors
    /// As [`Zoo::student`].
    pub(super) fn distilled(&self, folder: &'static str, stop: f64) -> Result<Arm, distill::DistillError> {
        let training = Training::Distilled { teacher: "pr-moe", stop };
        Ok(Arm { name: folder, folder, training, tuned_as: Some("student"), ..self.student()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Experts that take part and dense networks, over all layers.
    fn networks(arm: &Arm) -> usize {
        arm.config.model.experts_per_layer().iter().map(|&e| e.max(1)).sum()
    }

    #[test]
    fn arms_that_are_compared_are_of_like_size() {
        for scale in [Scale::Smoke, Scale::Cpu, Scale::Gpu] {
            let zoo = Zoo::new(scale).unwrap();
            let halves = [zoo.first_half(), zoo.second_half()].map(|arm| networks(&arm));
            assert_eq!(halves[0], halves[1], "{scale:?}");
            for arm in [zoo.uniform(), zoo.pyramid()] {
                assert!(networks(&arm).abs_diff(halves[0]) <= halves[0] / 8, "{scale:?}: {}", arm.name);
            }
            let size = |arm: Arm| arm.config.parameters().total as f64;
            let share = size(zoo.pr_moe()) / size(zoo.moe());
            assert!((0.25..0.4).contains(&share), "{scale:?}: PR-MoE has {share} of the parameters");
            let student = zoo.student().unwrap().config;
            assert!(student.model.layers < zoo.pr_moe().config.model.layers, "{scale:?}");
            assert!(size(zoo.dense_small()) < size(zoo.dense()) && size(zoo.dense()) < size(zoo.dense_large()));
        }
        let active = Zoo::new(Scale::Gpu).unwrap().moe().config.parameters().active;
        assert!((18_000_000..25_000_000).contains(&active), "{active}");
    }
}
