//! What a checkpoint of a run holds: weights, moments, and what else a run needs to go on as if it had never stopped.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use moebius::checkpoint::{Checkpoint, Checkpoints, Snapshot, Tensor, TensorInfo, TrainState};
use serde::{Deserialize, Serialize};

use super::{Event, Observer, Run, TrainingError, parameter_infos};
use crate::config::Config;
use crate::health::{self, Watch};

/// Keys of `extra` in `state.json`.
const SECONDS: &str = "training_seconds";
const ROUTERS: &str = "routers";

/// What is known of the routers beside their weights.
#[derive(Debug, Default, Serialize, Deserialize)]
struct RouterState {
    /// Steps since each expert's last token, by layer.
    idle: BTreeMap<usize, Vec<u32>>,
    /// The alarms that were given.
    watch: Watch,
}

impl Run {
    pub(super) fn load(&mut self, checkpoint: &mut Checkpoint) -> Result<(), TrainingError> {
        let state = checkpoint.state.clone();
        let path = checkpoint.path().to_owned();
        let written = Config::from_toml(&state.config, "the checkpoint's configuration")?;
        if state.config_hash != self.config.model_hash() {
            let difference = self.config.model_difference(&written)?;
            return Err(TrainingError::OtherConfig { path, difference });
        }
        let (wanted, found) = (self.config.train.moments, written.train.moments);
        if wanted != found {
            return Err(TrainingError::OtherMoments { path, wanted, found });
        }
        if state.tokenizer_hash != self.tokenizer_hash {
            let (wanted, found) = (self.tokenizer_name.clone(), state.tokenizer);
            return Err(TrainingError::OtherTokenizer { path, wanted, found });
        }
        let model = parameter_infos(&self.config);
        let optimizer = self.infos(&self.trainer.moments());
        checkpoint.model.expect(&model)?;
        checkpoint.optimizer.expect(&optimizer)?;
        for (file, infos) in [(&mut checkpoint.model, model), (&mut checkpoint.optimizer, optimizer)] {
            for info in infos {
                self.session.load(&info.name, file)?;
            }
        }
        self.trainer.resume_at(state.step);
        self.best = state.best_validation_loss;
        let seconds = state.extra.get(SECONDS).and_then(serde_json::Value::as_f64);
        self.training_time = Duration::from_secs_f64(seconds.unwrap_or(0.0).max(0.0));
        let routers = match state.extra.get(ROUTERS) {
            Some(value) => serde_json::from_value(value.clone()).map_err(|e| e.to_string()),
            None => Ok(RouterState::default()),
        };
        let fits = |routers: &RouterState| {
            let layer = |(layer, steps): (&usize, &Vec<u32>)| self.moe_layers.contains(&(*layer, steps.len()));
            routers.idle.iter().all(layer)
        };
        let routers = routers.and_then(|r| if fits(&r) { Ok(r) } else { Err("that of another model".into()) });
        let routers = routers.map_err(|found| TrainingError::RouterState { path, key: ROUTERS, found })?;
        health::restore_idle(&mut self.session, &self.moe_layers, &routers.idle)?;
        self.watch = routers.watch;
        Ok(())
    }

    fn infos(&self, names: &[String]) -> Vec<TensorInfo> {
        let info = |name: &String| {
            let ty = self.session.ty(name)?;
            Some(TensorInfo::new(name, ty.dtype.into(), ty.shape.to_vec()))
        };
        names.iter().filter_map(info).collect()
    }

    pub(super) fn save(&mut self, observer: &mut Observer<'_>) -> Result<(), TrainingError> {
        let step = self.trainer.steps_done();
        let session = &self.session;
        let routers = RouterState { idle: health::idle_steps(session, &self.moe_layers)?, watch: self.watch.clone() };
        let routers = serde_json::to_value(routers).unwrap_or_default();
        let seconds = self.training_time.as_secs_f64().into();
        let tensors = |infos: Vec<TensorInfo>| {
            let tensor = |info: TensorInfo| {
                let name = info.name.clone();
                Tensor::lazy(info, move || Ok(session.bytes(&name)?))
            };
            infos.into_iter().map(tensor).collect()
        };
        let snapshot = Snapshot {
            state: TrainState {
                step,
                tokens: step * self.config.tokens_per_step(),
                seed: self.config.train.seed,
                data_position: step * self.config.train.accumulate as u64,
                config: self.config.to_toml()?,
                config_hash: self.config.model_hash(),
                model: self.config.model.name.clone(),
                tokenizer: self.tokenizer_name.clone(),
                tokenizer_hash: self.tokenizer_hash.clone(),
                best_validation_loss: self.best,
                extra: [(SECONDS.to_owned(), seconds), (ROUTERS.to_owned(), routers)].into(),
            },
            model: tensors(parameter_infos(&self.config)),
            optimizer: tensors(self.infos(&self.trainer.moments())),
        };
        let path = self.checkpoints.save(snapshot)?;
        observer(Event::Saved(&path));
        Ok(())
    }
}

/// The newest intact checkpoint, if there is any; damaged ones are told to the observer.
pub(super) fn newest_intact(
    checkpoints: &Checkpoints,
    out: &Path,
    observer: &mut Observer<'_>,
) -> Result<Option<Checkpoint>, TrainingError> {
    let mut intact = checkpoints.latest_intact()?;
    intact.damaged.iter().for_each(|(step, why)| observer(Event::Damaged(*step, why)));
    if intact.checkpoint.is_none() && !intact.damaged.is_empty() {
        return Err(TrainingError::AllDamaged { path: out.into(), newest: intact.damaged.remove(0).1 });
    }
    Ok(intact.checkpoint)
}
