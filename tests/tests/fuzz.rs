//! What a run of the fuzzer makes of parsers that are broken. Its allocator counts for this process alone. The parsers there are have
//! their run in `parsers.rs`.

use moebius_tests::fuzz::{Failure, Meter, Parse, Report, Target, Then, run};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Fifty inputs of a parser.
fn fifty(parse: Parse) -> Result<Report, Box<Failure>> {
    let (name, seeds, words) = ("planted", vec![b"some text".to_vec()], vec!["word".to_owned()]);
    let target = Target { name, seeds, words, repair: Box::new(|input, _| input), parse };
    run((0, &target), 1, 0..50, None, Meter::PEAK, &|_| {})
}

#[test]
fn a_broken_parser_is_told_with_its_input() {
    let fine = |_: &[u8]| Some(Box::new(|| Ok(())) as Then);
    let report = fifty(Box::new(fine)).unwrap();
    assert_eq!((report.inputs, report.read), (50, 50));
    let panics = fifty(Box::new(|input| if input.len() > 3 { panic!("planted") } else { None })).unwrap_err();
    assert!(panics.what == "panic: planted" && panics.input.len() > 3, "{panics:?}");
    // More than sixteen times the input's size and what any parser may take.
    let greedy = |input: &[u8]| {
        std::hint::black_box(vec![1u8; 17 * input.len() + (128 << 10)]);
        None
    };
    let greedy = fifty(Box::new(greedy)).unwrap_err();
    assert!(greedy.what.contains("bytes of memory for") && !greedy.input.is_empty(), "{greedy:?}");
    let wrong = fifty(Box::new(|_| Some(Box::new(|| Err("not what was read".into())) as Then))).unwrap_err();
    assert_eq!((wrong.index, wrong.what.as_str()), (0, "not what was read"));
}
