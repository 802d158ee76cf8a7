//! A run allocates nothing. Alone in its program, as the allocator counts for all threads.

use std::alloc::System;

use moebius::{Optimizer, training_step};
use moebius_backends::Backend;
use moebius_backends::cpu::Cpu;
use moebius_ir::{DType, Role, passes};
use moebius_tests::Sketch;
use moebius_tests::layers::{self, Moe};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn allocations() -> usize {
    COUNTING.stats().allocations
}

#[test]
fn a_run_allocates_nothing() {
    for dtype in [DType::F32, DType::Bf16] {
        let mut s = Sketch::new(dtype);
        let layer = Moe { width: 32, hidden: 48, experts: 4, k: 2, capacity: Some(40), renormalise: true };
        let loss = layers::transformer(&mut s, 4, 17, 67, layer).unwrap();
        if dtype == DType::F32 {
            training_step(&mut s.graph, loss, &Optimizer::default()).unwrap();
        } else {
            // Parameters of the optimizer are f32, so here only the way to them and back.
            s.out(loss).unwrap();
            s.differentiate().unwrap();
        }
        let graph = passes::optimise(&s.graph).unwrap();
        let cpu = Cpu::new(Some(2)).unwrap().with_checks(false);
        let executable = cpu.compile(cpu.plan(graph.clone()).unwrap()).unwrap();
        let (mut instance, mut store) = (executable.instantiate().unwrap(), cpu.new_store());
        for (name, value) in graph.inputs() {
            let ty = graph.ty(*value);
            let bytes = s.inputs.get(name).map_or_else(|| vec![0; ty.bytes()], moebius_ir::Tensor::to_bytes);
            if graph.input_of(*value).is_some_and(|i| i.role != Role::Feed) {
                store.insert(name, ty).unwrap();
                store.write(name, &bytes).unwrap();
            } else {
                instance.write(name, &bytes).unwrap();
            }
        }
        for _ in 0..3 {
            instance.run(store.as_mut()).unwrap();
        }
        let before = allocations();
        for _ in 0..20 {
            instance.run(store.as_mut()).unwrap();
        }
        let made = allocations() - before;
        assert_eq!(made, 0, "{made} allocations in 20 runs of {} steps", executable.plan().steps().len());
        // The counter does count.
        let before = allocations();
        drop(std::hint::black_box(vec![1u8; 100]));
        assert!(allocations() > before);
    }
}
