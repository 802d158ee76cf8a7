//! Checkpoints survive kills, full disks and damage. The oracle for the file format is the `safetensors` crate's own reader.

use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
};

use super::*;

/// A small generator, so that the tests' data and positions are the same in every run.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

type Set = Vec<(TensorInfo, Vec<u8>)>;

fn tensors(prefix: &str, seed: u64) -> Set {
    let mut rng = Rng(seed);
    let shapes: [(&str, Dtype, &[usize]); 7] = [
        ("mask", Dtype::Bool, &[3]),
        ("router.weight", Dtype::F32, &[4, 8]),
        ("experts.up", Dtype::Bf16, &[4, 8, 16]),
        ("experts.down", Dtype::F16, &[4, 16, 8]),
        ("scale", Dtype::F32, &[]),
        ("empty", Dtype::I32, &[0, 5]),
        ("counts", Dtype::U32, &[5]),
    ];
    let make = |(name, dtype, shape): (&str, Dtype, &[usize])| {
        let info = TensorInfo::new(format!("{prefix}.{name}"), dtype, shape);
        let bytes = (0..info.bytes().unwrap()).map(|_| rng.next() as u8).collect();
        (info, bytes)
    };
    shapes.into_iter().map(make).collect()
}

fn borrow(set: &Set) -> Vec<Tensor<'_>> {
    set.iter().map(|(info, bytes)| Tensor::borrowed(info.clone(), bytes)).collect()
}

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        tokens: step * 2048,
        seed: u64::MAX - 3,
        data_position: 17,
        config: "[model]\nname = \"tiny\"\n".into(),
        config_hash: "abc".into(),
        model: "tiny".into(),
        tokenizer: "bytes".into(),
        tokenizer_hash: String::new(),
        best_validation_loss: Some(1.234_567_890_123_456_7),
        extra: [("lr".to_string(), serde_json::json!(0.1_f32))].into(),
    }
}

/// Model and optimizer of a step: other bytes at every step and try.
fn sets(step: u64, try_: u64) -> (Set, Set) {
    (tensors("model", step * 100 + try_), tensors("optimizer", step * 100 + try_ + 50))
}

fn save(checkpoints: &Checkpoints, step: u64, try_: u64) -> Result<PathBuf, CheckpointError> {
    let (model, optimizer) = sets(step, try_);
    checkpoints.save(Snapshot { state: state(step), model: borrow(&model), optimizer: borrow(&optimizer) })
}

fn load_all(file: &mut TensorFile) -> Set {
    let infos: Vec<TensorInfo> = file.tensors().cloned().collect();
    let load = |info: TensorInfo| {
        let mut bytes = vec![0xaa; info.bytes().unwrap() as usize];
        file.load_into(&info.name, &mut bytes).unwrap();
        (info, bytes)
    };
    infos.into_iter().map(load).collect()
}

fn sorted(mut set: Set) -> Set {
    set.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    set
}

/// Which try of a step a checkpoint holds; panics unless it is exactly one of them.
fn try_of(checkpoint: &mut Checkpoint, tries: u64) -> u64 {
    let step = checkpoint.state.step;
    assert_eq!(checkpoint.state, state(step));
    let (model, optimizer) = (load_all(&mut checkpoint.model), load_all(&mut checkpoint.optimizer));
    let found = (sorted(model), sorted(optimizer));
    let is = |t: &u64| {
        let (model, optimizer) = sets(step, *t);
        found == (sorted(model), sorted(optimizer))
    };
    (0..tries).find(is).expect("neither the old nor the new checkpoint")
}

fn files_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_was_saved_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 3).unwrap();
    assert_eq!(checkpoints.latest().unwrap(), None);
    assert!(checkpoints.latest_intact().unwrap().checkpoint.is_none());
    let path = save(&checkpoints, 7, 0).unwrap();
    assert_eq!(files_in(&path), [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE]);
    let mut loaded = Checkpoints::open(dir.path()).unwrap().load(7).unwrap();
    assert_eq!(try_of(&mut loaded, 1), 0);
    loaded.verify().unwrap();

    // Another reader of the format finds the same bytes, aligned to their elements.
    let bytes = fs::read(path.join(MODEL_FILE)).unwrap();
    let (model, _) = sets(7, 0);
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), model.len());
    for (info, wanted) in &model {
        let found = theirs.tensor(&info.name).unwrap();
        assert_eq!((found.data(), found.shape()), (wanted.as_slice(), info.shape.as_slice()), "{}", info.name);
        assert_eq!(Dtype::from_safetensors(found.dtype()), Some(info.dtype));
        let offset = found.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(offset % info.dtype.size(), 0, "{}", info.name);
    }
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    assert_eq!(metadata["format"], "moebius");
    assert_eq!(metadata["config"], "[model]\nname = \"tiny\"\n");

    // Equal content makes equal files.
    let other = tempfile::tempdir().unwrap();
    let again = save(&Checkpoints::create(other.path(), 3).unwrap(), 7, 0).unwrap();
    for name in [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE] {
        assert_eq!(fs::read(path.join(name)).unwrap(), fs::read(again.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn large_and_lazy_tensors_stream() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(5);
    let n = write::CHUNK * 2 + 12;
    let big: Vec<u8> = (0..n).map(|_| rng.next() as u8).collect();
    let info = TensorInfo::new("big", Dtype::F32, [n / 4]);
    let small = TensorInfo::new("small", Dtype::F32, [1]);
    let model = vec![
        Tensor::borrowed(small.clone(), &[1, 2, 3, 4]),
        Tensor::lazy(info.clone(), || Ok(Cow::Owned(big.clone()))),
        Tensor::borrowed(TensorInfo::new("last", Dtype::Bool, [2]), &[0, 1]),
    ];
    let checkpoints = Checkpoints::create(dir.path(), 1).unwrap();
    checkpoints.save(Snapshot { state: state(1), model, optimizer: vec![] }).unwrap();
    let mut loaded = checkpoints.load(1).unwrap();
    loaded.verify().unwrap();
    let mut found = Vec::new();
    loaded
        .model
        .load_chunks("big", |offset, bytes| {
            assert_eq!(offset, found.len() as u64);
            found.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap();
    assert!(found == big);
    let mut four = [0; 4];
    loaded.model.load_into("small", &mut four).unwrap();
    assert_eq!(four, [1, 2, 3, 4]);
    let refused = loaded.model.load_chunks("big", |_, _| Err("device lost".into())).unwrap_err();
    assert!(matches!(&refused, CheckpointError::Sink { name, .. } if name == "big"), "{refused}");
    let short = loaded.model.load_into("small", &mut [0; 3]).unwrap_err();
    assert!(matches!(short, CheckpointError::BufferSize { wanted: 4, found: 3, .. }), "{short}");
    let unknown = loaded.model.load_into("nobody", &mut []).unwrap_err();
    assert!(matches!(unknown, CheckpointError::NoSuchTensor { .. }), "{unknown}");
}

#[test]
fn the_last_are_kept_and_the_oldest_go() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 2).unwrap();
    for step in [5, 10, 9, 100] {
        save(&checkpoints, step, 0).unwrap();
    }
    assert_eq!(checkpoints.list().unwrap(), [10, 100]);
    assert_eq!(files_in(checkpoints.dir()), [".lock", "step-10", "step-100"]);
    // Going back to an older step never costs the checkpoint just written.
    save(&checkpoints, 50, 0).unwrap();
    assert_eq!(checkpoints.list().unwrap(), [10, 50, 100]);
    save(&checkpoints, 100, 1).unwrap();
    assert_eq!(checkpoints.list().unwrap(), [50, 100]);
    assert_eq!(try_of(&mut checkpoints.load(100).unwrap(), 2), 1);
    let all = Checkpoints::create(dir.path(), 0).unwrap();
    for step in 200..205 {
        save(&all, step, 0).unwrap();
    }
    assert_eq!(all.list().unwrap().len(), 7);
    let missing = all.load(3).unwrap_err();
    assert!(matches!(&missing, CheckpointError::NoSuchStep { step: 3, available, .. } if available.len() == 7));
}

/// A process killed before each single change to the disk, in a save that replaces a checkpoint and removes another.
#[test]
fn a_kill_at_any_moment_leaves_the_old_or_the_new() {
    let mut outcomes = [0, 0];
    for die_after in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::create(dir.path(), 2).unwrap();
        for step in [1, 2, 3] {
            save(&checkpoints, step, 0).unwrap();
        }
        let narrower = Checkpoints::create(dir.path(), 1).unwrap();
        narrower.disk.faults.die_after.set(Some(die_after));
        let finished = save(&narrower, 3, 1).is_ok() && narrower.disk.faults.die_after.get() != Some(0);

        // What a reader without the right to write sees, and what the next run sees.
        let mut seen = checkpoints.load(3).unwrap();
        let reader = try_of(&mut seen, 2);
        let next = Checkpoints::create(dir.path(), 2).unwrap();
        let intact = next.latest_intact().unwrap();
        assert!(intact.damaged.is_empty(), "{:?}", intact.damaged);
        let mut newest = intact.checkpoint.unwrap();
        assert_eq!(newest.state.step, 3);
        let which = try_of(&mut newest, 2);
        assert_eq!(reader, which);
        outcomes[which as usize] += 1;
        for step in next.list().unwrap() {
            next.load(step).unwrap().verify().unwrap();
        }
        for name in files_in(next.dir()) {
            assert!(name == ".lock" || matches!(Name::parse(&name), Some(Name::Step(_))), "{name} was left");
        }
        save(&next, 4, 0).unwrap();
        if finished {
            assert_eq!(which, 1);
            break;
        }
    }
    assert!(outcomes[0] > 5 && outcomes[1] > 3, "{outcomes:?}");
}

#[test]
fn a_full_disk_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 1).unwrap();
    save(&checkpoints, 1, 0).unwrap();
    let mut room = 0;
    loop {
        checkpoints.disk.faults.room.set(Some(room));
        match save(&checkpoints, 2, 0) {
            Ok(_) => break,
            Err(CheckpointError::Io { operation: Operation::Write, path, source }) => {
                assert_eq!(source.kind(), ErrorKind::StorageFull);
                assert!(path.starts_with(checkpoints.dir()), "{}", path.display());
            }
            Err(other) => panic!("{other}"),
        }
        assert_eq!(files_in(checkpoints.dir()), [".lock", "step-1"]);
        assert_eq!(try_of(&mut checkpoints.load(1).unwrap(), 1), 0);
        room += 500;
    }
    assert!(room > 3000);
    assert_eq!(checkpoints.list().unwrap(), [2]);
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Checkpoints::open(dir.path().join("nowhere")).unwrap_err();
    assert!(matches!(&missing, CheckpointError::Io { operation: Operation::List, .. }), "{missing}");
    // A file where the folder should be refuses even the superuser, whom permissions do not stop.
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let refused = Checkpoints::create(&file, 1).unwrap_err();
    assert!(matches!(&refused, CheckpointError::Io { operation: Operation::CreateFolder, .. }), "{refused}");
    let empty = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(&empty, CheckpointError::NotACheckpoint { .. }), "{empty}");
}

#[test]
fn every_flipped_bit_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 0).unwrap();
    save(&checkpoints, 1, 0).unwrap();
    let path = save(&checkpoints, 2, 0).unwrap();
    let mut rng = Rng(99);
    let mut named = 0;
    for i in 0..240 {
        let name = [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE][i % 3];
        let file = path.join(name);
        let good = fs::read(&file).unwrap();
        let (at, bit) = (rng.below(good.len()), rng.below(8));
        let mut bad = good.clone();
        bad[at] ^= 1 << bit;
        fs::write(&file, &bad).unwrap();
        let mut intact = checkpoints.latest_intact().unwrap();
        assert_eq!(intact.checkpoint.as_ref().unwrap().state.step, 1, "{name} byte {at} bit {bit}");
        let (step, why) = intact.damaged.remove(0);
        assert_eq!(step, 2);
        let CheckpointError::Damaged { path: found, damage } = &why else { panic!("{why}") };
        assert_eq!(*found, file);
        match damage {
            Damage::Tensors(tensors) => {
                let theirs = safetensors::SafeTensors::deserialize(&good).unwrap();
                let start = theirs.tensor(&tensors[0].name).unwrap().data().as_ptr() as usize - good.as_ptr() as usize;
                let length = theirs.tensor(&tensors[0].name).unwrap().data().len();
                assert!(tensors.len() == 1 && (start..start + length).contains(&at), "{why}");
                named += 1;
                // The same is found by who loads without verifying first.
                let mut loaded = checkpoints.load(2).unwrap();
                let which = if name == MODEL_FILE { &mut loaded.model } else { &mut loaded.optimizer };
                let again = which.load_into(&tensors[0].name, &mut vec![0; length]).unwrap_err();
                assert_eq!(again.to_string(), why.to_string());
            }
            Damage::Header { .. } => assert!(name != STATE_FILE),
            Damage::State { .. } => assert!(name == STATE_FILE),
            Damage::Absent | Damage::Length { .. } | Damage::Undescribed => panic!("{why}"),
        }
        fs::write(&file, &good).unwrap();
    }
    assert!(named > 50, "{named}");
    assert!(checkpoints.latest_intact().unwrap().damaged.is_empty());
}

#[test]
fn truncated_and_missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 0).unwrap();
    let path = save(&checkpoints, 1, 0).unwrap();
    for name in [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE] {
        let file = path.join(name);
        let good = fs::read(&file).unwrap();
        for keep in [0, 1, 7, 8, 20, good.len() / 2, good.len() - 1] {
            fs::write(&file, &good[..keep]).unwrap();
            let why = checkpoints.load(1).unwrap_err();
            let CheckpointError::Damaged { path: found, damage } = &why else { panic!("{why}") };
            assert_eq!(*found, file);
            if name != STATE_FILE {
                assert_eq!(*damage, Damage::Length { wanted: good.len() as u64, found: keep as u64 });
            }
        }
        let mut longer = good.clone();
        longer.push(b'\n');
        fs::write(&file, &longer).unwrap();
        assert!(matches!(checkpoints.load(1), Err(CheckpointError::Damaged { .. })), "{name}");
        fs::remove_file(&file).unwrap();
        let why = checkpoints.load(1).unwrap_err();
        assert!(matches!(&why, CheckpointError::Damaged { path, damage: Damage::Absent } if *path == file), "{why}");
        fs::write(&file, &good).unwrap();
    }
    checkpoints.load(1).unwrap().verify().unwrap();
}

#[test]
fn another_models_checkpoint_is_refused_naming_all_differences() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 0).unwrap();
    save(&checkpoints, 1, 0).unwrap();
    let loaded = checkpoints.load(1).unwrap();
    let mut wanted: Vec<TensorInfo> = sets(1, 0).0.into_iter().map(|(info, _)| info).collect();
    loaded.model.expect(&wanted).unwrap();
    wanted[1].shape = vec![8, 8];
    wanted[2].dtype = Dtype::F32;
    wanted[3].name = "model.other".into();
    let error = loaded.model.expect(&wanted).unwrap_err();
    let text = error.to_string();
    let CheckpointError::Mismatch { mismatch, .. } = error else { panic!("{text}") };
    assert_eq!((mismatch.missing.len(), mismatch.unexpected.len(), mismatch.different.len()), (1, 1, 2));
    for part in [
        "`model.router.weight` wanted f32 [8, 8], found f32 [4, 8]",
        "`model.experts.up` wanted f32 [4, 8, 16], found bf16 [4, 8, 16]",
        "1 tensor missing: `model.other` f16 [4, 16, 8]",
        "1 tensor unexpected: `model.experts.down` f16 [4, 16, 8]",
    ] {
        assert!(text.contains(part), "{part} not in {text}");
    }
}

#[test]
fn tensors_that_cannot_be_saved_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 1).unwrap();
    let info = |name: &str| TensorInfo::new(name, Dtype::Bool, [2]);
    let try_ = |model| checkpoints.save(Snapshot { state: state(1), model, optimizer: vec![] }).unwrap_err();
    let twice = try_(vec![Tensor::borrowed(info("a"), &[0, 1]), Tensor::borrowed(info("a"), &[0, 1])]);
    assert!(matches!(&twice, CheckpointError::TensorNames { names } if *names == ["a"]), "{twice}");
    let reserved = try_(vec![Tensor::borrowed(info("__metadata__"), &[0, 1])]);
    assert!(matches!(&reserved, CheckpointError::TensorNames { .. }), "{reserved}");
    let short = try_(vec![Tensor::borrowed(info("a"), &[0])]);
    assert!(matches!(&short, CheckpointError::TensorSize { wanted: 2, found: 1, .. }), "{short}");
    let huge = try_(vec![Tensor::borrowed(TensorInfo::new("a", Dtype::F32, [usize::MAX, 2]), &[])]);
    assert!(matches!(&huge, CheckpointError::TensorSize { .. }), "{huge}");
    let lost = try_(vec![Tensor::lazy(info("a"), || Err("device lost".into()))]);
    assert!(lost.to_string().contains("device lost"), "{lost}");
    assert_eq!(files_in(checkpoints.dir()), [".lock"]);
}

#[test]
fn exported_weights_and_foreign_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    let (model, _) = sets(1, 0);
    export_weights(&path, "tiny", "x = 1", borrow(&model)).unwrap();
    assert_eq!(files_in(dir.path()), ["weights.safetensors"]);
    let mut file = TensorFile::open(&path).unwrap();
    assert_eq!(file.metadata()["config"], "x = 1");
    assert_eq!(sorted(load_all(&mut file)), sorted(model));
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let cut = TensorFile::open(&path).unwrap_err();
    assert!(matches!(&cut, CheckpointError::Damaged { damage: Damage::Length { .. }, .. }), "{cut}");

    for junk in [&b""[..], b"1234567", b"\xff\xff\xff\xff\xff\xff\xff\xffabc", b"\x05\0\0\0\0\0\0\0"] {
        fs::write(&path, junk).unwrap();
        let error = TensorFile::open(&path).unwrap_err();
        assert!(matches!(&error, CheckpointError::HeaderLength { .. }), "{error}");
    }
    fs::write(&path, b"\x02\0\0\0\0\0\0\0[]").unwrap();
    assert!(matches!(TensorFile::open(&path), Err(CheckpointError::NotSafetensors { .. })));
    // Offsets at the end of 64 bits.
    let json = format!(r#"{{"a":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, u64::MAX);
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    fs::write(&path, &bytes).unwrap();
    assert!(TensorFile::open(&path).is_err());

    let data = [0_u8; 16];
    let view = |dtype| safetensors::tensor::TensorView::new(dtype, vec![2], &data).unwrap();
    let foreign = [("a", view(safetensors::Dtype::F64)), ("b", view(safetensors::Dtype::I64))];
    fs::write(&path, safetensors::serialize(foreign, None).unwrap()).unwrap();
    let error = TensorFile::open(&path).unwrap_err();
    assert!(matches!(&error, CheckpointError::ForeignDtype { tensors, .. } if tensors.len() == 2), "{error}");
}

#[test]
fn another_version_is_recognised() {
    let path = Path::new("state.json");
    let text = StateFile { format: FORMAT + 1, state: state(1), files: BTreeMap::new() }.to_text(path).unwrap();
    let error = StateFile::from_bytes(text.as_bytes(), path).unwrap_err();
    assert!(matches!(error, CheckpointError::Format { wanted: FORMAT, found, .. } if found == FORMAT + 1), "{error}");
}

#[test]
fn other_names_are_left_alone() {
    for name in
        ["step-", "step-07", "step-x", "step-1.tmp-", "step-1.tmp-x", "step-1.bak-3", "Step-1", "step-1.old", "step--1"]
    {
        assert_eq!(Name::parse(name), None, "{name}");
    }
    assert_eq!(Name::parse("step-12"), Some(Name::Step(12)));
    assert_eq!(Name::parse("step-12.old-34"), Some(Name::Old(12)));
    // A writer at work elsewhere keeps its folder: without the lock nothing is cleaned up.
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(dir.path(), 1).unwrap();
    let theirs = checkpoints.dir().join("step-5.tmp-1");
    fs::create_dir(&theirs).unwrap();
    let lock = checkpoints.lock().unwrap();
    Checkpoints::open(dir.path()).unwrap();
    assert!(theirs.exists());
    drop(lock);
    Checkpoints::open(dir.path()).unwrap();
    assert!(!theirs.exists());
}
