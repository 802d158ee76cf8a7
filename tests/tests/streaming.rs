//! Weights on their way from a checkpoint to a device: how much memory they take, counted by the allocator. One test alone, as
//! others at the same time would be counted too.

use std::sync::Arc;

use moebius::checkpoint::{Checkpoint, CheckpointError, Checkpoints, Dtype, Snapshot, Tensor, TensorInfo, TrainState};
use moebius::{Engine, Error};
use moebius_backends::cuda::Cuda;
use moebius_ir::{DType, TensorType};
use moebius_tests::device;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// 200 MB of f32: one large tensor, as the experts of a layer are, and some small ones.
const SHAPES: [(&str, &[usize]); 4] =
    [("experts", &[16, 1024, 2560]), ("matrix", &[1000, 8001]), ("vector", &[77]), ("scalar", &[])];

/// What one piece and the buffers of reading may take.
const ROOM: usize = 4 << 20;

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

fn value(name: &str, i: usize) -> f32 {
    // Different bits in all places; no random numbers, which would take most of the test's time.
    ((i + name.len()) as u32).wrapping_mul(0x9e37_79b1) as f32 * 1e-6 - (i % 7) as f32
}

#[test]
fn weights_take_the_memory_of_the_device_and_one_piece() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::create(folder.path(), 1).unwrap();
    let tensor = |(name, shape): (&'static str, &[usize])| {
        let shape = shape.to_vec();
        Tensor::lazy(TensorInfo::new(name, Dtype::F32, shape.clone()), move || {
            let mut bytes = vec![0; 4 * elements(&shape)];
            bytes.chunks_exact_mut(4).enumerate().for_each(|(i, b)| b.copy_from_slice(&value(name, i).to_le_bytes()));
            Ok(bytes.into())
        })
    };
    let snapshot = Snapshot { state: TrainState::default(), model: SHAPES.map(tensor).into(), optimizer: Vec::new() };
    let path = checkpoints.save(snapshot).unwrap();
    let size = std::fs::metadata(path.join("model.safetensors")).unwrap().len();
    assert!(size > 190 << 20, "{size}");

    let mut engines = vec![(Engine::with_backend(Arc::new(device::cpu(1))), true)];
    if Cuda::count().is_ok_and(|n| n > 0) {
        engines.push((Engine::cuda(0).unwrap(), false));
    }
    for (engine, on_host) in engines {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let mut file = Checkpoint::open(&path).unwrap().model;
            let before = MEMORY.current_usage();
            MEMORY.reset_peak_usage();
            let mut session = engine.session();
            let mut stored = 0;
            for (name, shape) in SHAPES {
                let ty = TensorType::new(dtype, shape);
                // Memory for large tensors is asked for in pages of 2 MiB.
                stored += ty.bytes().next_multiple_of(2 << 20);
                session.insert(name, &ty).unwrap();
                session.load(name, &mut file).unwrap();
            }
            let peak = MEMORY.peak_usage() - before;
            let most = if on_host { stored } else { 0 } + ROOM;
            assert!(peak <= most, "{} {dtype}: a peak of {peak} bytes, {stored} are stored", engine.name());
            for (name, shape) in SHAPES {
                let bytes = session.bytes(name).unwrap();
                let width = dtype.bytes();
                assert_eq!(bytes.len(), elements(shape) * width);
                // Every element near the borders of pieces, and many between.
                let borders = (0..elements(shape) + 3).step_by(262_144).flat_map(|i| i.saturating_sub(3)..i + 3);
                for i in borders.chain((0..elements(shape)).step_by(9973)).filter(|&i| i < elements(shape)) {
                    let wanted = moebius_ir::Tensor::new(TensorType::new(dtype, []), vec![f64::from(value(name, i))]);
                    assert_eq!(bytes[i * width..][..width], wanted.rounded().to_bytes(), "{name} {i} {dtype}");
                }
            }
        }
    }

    // What does not fit is an error with both types; what is damaged is found while it is read.
    let mut session = Engine::with_backend(Arc::new(device::cpu(1))).session();
    let mut file = Checkpoint::open(&path).unwrap().model;
    for (name, ty) in [("vector", TensorType::f32([7, 11])), ("matrix", TensorType::i32([1000, 8001]))] {
        session.insert(name, &ty).unwrap();
        let refused = session.load(name, &mut file).unwrap_err();
        assert!(matches!(&refused, Error::LoadedType { wanted, .. } if *wanted == ty), "{refused}");
    }
    session.insert("absent", &TensorType::f32([2])).unwrap();
    let absent = session.load("absent", &mut file).unwrap_err();
    assert!(matches!(absent, Error::Checkpoint(CheckpointError::NoSuchTensor { .. })), "{absent}");
    assert!(matches!(session.load("unknown", &mut file), Err(Error::Backend(moebius_backends::Error::NoSuch { .. }))));
    let mut bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path.join("model.safetensors"), &bytes).unwrap();
    let mut file = Checkpoint::open(&path).unwrap().model;
    session.insert("experts", &TensorType::new(DType::Bf16, [16, 1024, 2560])).unwrap();
    let damaged = session.load("experts", &mut file).unwrap_err();
    assert!(matches!(damaged, Error::Checkpoint(CheckpointError::Damaged { .. })), "{damaged}");
}
