//! Ops that only move elements.

use moebius_ir::{DType, TensorType};

use super::{Build, Case, FLOATS, ONE, case};
use crate::verify::tolerance::Class;

pub(super) fn cases() -> Vec<Case> {
    let exact = |op, name: String, build: Build| case(op, name, Class::Exact, FLOATS, build);
    let mut cases = vec![
        exact(
            "reshape",
            "to more and fewer axes".into(),
            Box::new(|s| {
                let x = s.float([4, 6, 5], |x| x)?;
                let (flat, split) = (s.graph.reshape(x, [120])?, s.graph.reshape(x, [2, 2, 3, 2, 5])?);
                s.out(flat)?;
                s.out(split)
            }),
        ),
        exact(
            "reshape",
            "a scalar".into(),
            Box::new(|s| {
                let x = s.float([], |x| x)?;
                let y = s.graph.reshape(x, [1, 1])?;
                s.out(y)
            }),
        ),
        exact(
            "reshape",
            "of a computed value, read on both sides".into(),
            Box::new(|s| {
                let x = s.float([4, 6], |x| x)?;
                let moved = s.graph.transpose(x, &[1, 0])?;
                let flat = s.graph.reshape(moved, [24])?;
                let padded = s.graph.pad(flat, 0, 1, 2)?;
                s.out(moved)?;
                s.out(flat)?;
                s.out(padded)
            }),
        ),
    ];
    cases.push(exact(
        "after",
        "computed from before and after another value".into(),
        Box::new(|s| {
            let x = s.float([4, 6], |x| x)?;
            let (early, trigger) = (s.graph.transpose(x, &[1, 0])?, s.graph.pad(x, 0, 1, 2)?);
            let late = s.graph.after(x, trigger)?;
            let moved = s.graph.transpose(late, &[1, 0])?;
            s.out(early)?;
            s.out(moved)?;
            s.out(late)
        }),
    ));
    for perm in [vec![1, 0], vec![0, 2, 1], vec![2, 0, 1], vec![1, 0, 2], vec![0, 2, 1, 3], vec![3, 2, 1, 0], vec![0]] {
        cases.push(exact(
            "transpose",
            format!("{perm:?}"),
            Box::new(move |s| {
                let shape = &[33, 18, 5, 3][..perm.len()];
                let x = s.float(shape, |x| x)?;
                let y = s.graph.transpose(x, &perm)?;
                s.out(y)
            }),
        ));
    }
    for (from, to) in [
        (vec![], vec![3, 4]),
        (vec![5], vec![3, 5]),
        (vec![3, 1], vec![3, 66]),
        (vec![2, 1, 3], vec![2, 4, 3]),
        (vec![1, 7, 1], vec![2, 5, 7, 3]),
        (vec![1, 7, 1], vec![6, 7, 3]),
    ] {
        cases.push(exact(
            "broadcast",
            format!("{from:?} to {to:?}"),
            Box::new(move |s| {
                let x = s.float(from.clone(), |x| x)?;
                let y = s.graph.broadcast(x, to.clone())?;
                s.out(y)
            }),
        ));
    }
    for axis in 0..3 {
        cases.push(exact(
            "slice",
            format!("axis {axis}"),
            Box::new(move |s| {
                let x = s.float([6, 7, 8], |x| x)?;
                for (start, len) in [(0, 2), (3, 3), (5, 0), (0, 6)] {
                    let y = s.graph.slice(x, axis, start, len)?;
                    s.out(y)?;
                }
                Ok(())
            }),
        ));
        cases.push(exact(
            "pad",
            format!("axis {axis}"),
            Box::new(move |s| {
                let x = s.float([3, 4, 5], |x| x)?;
                for (before, after) in [(2, 0), (0, 3), (1, 1)] {
                    let y = s.graph.pad(x, axis, before, after)?;
                    s.out(y)?;
                }
                Ok(())
            }),
        ));
        cases.push(exact(
            "concat",
            format!("axis {axis}"),
            Box::new(move |s| {
                let shape = |extent| {
                    let mut shape = vec![3, 4, 5];
                    shape[axis] = extent;
                    shape
                };
                let (a, b, c) = (s.float(shape(1), |x| x)?, s.float(shape(6), |x| x)?, s.float(shape(2), |x| x)?);
                let (one, all) = (s.graph.concat(&[b], axis)?, s.graph.concat(&[a, b, c, a], axis)?);
                s.out(one)?;
                s.out(all)
            }),
        ));
    }
    for dtype in [DType::I32, DType::U32, DType::Bool] {
        for op in ["transpose", "broadcast", "slice", "pad", "concat", "reshape", "after"] {
            cases.push(case(op, format!("of {dtype}"), Class::Exact, ONE, move |s| {
                let data =
                    (0..12).map(|i| f64::from(if dtype == DType::Bool { i % 3 % 2 } else { i * 1_001 })).collect();
                let x = s.fixed(TensorType::new(dtype, [3, 4]), data)?;
                let g = &mut s.graph;
                let y = match op {
                    "transpose" => g.transpose(x, &[1, 0])?,
                    "broadcast" => g.broadcast(x, [2, 3, 4])?,
                    "slice" => g.slice(x, 1, 1, 2)?,
                    "pad" => g.pad(x, 0, 1, 1)?,
                    "concat" => g.concat(&[x, x], 1)?,
                    "after" => g.after(x, x)?,
                    _reshape => g.reshape(x, [12])?,
                };
                s.aux(y)
            }));
        }
    }
    cases
}
