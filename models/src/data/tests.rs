use std::path::Path;

use super::*;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::tests::{byte_bpe, two_words};

fn spec<'a>(train: &'a [Source], tokenizer: &'a Tokenizer, cache_dir: &'a Path) -> CorpusSpec<'a> {
    CorpusSpec { train, validation: Validation::Fraction(0.1), tokenizer, vocab: None, cache_dir }
}

fn open(spec: &CorpusSpec<'_>) -> Result<Corpus, DataError> {
    Corpus::open(spec, &mut |_, _, _| ())
}

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> Source {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    Source::File(path)
}

fn all(stream: &Stream) -> Vec<i32> {
    let mut ids = vec![0; stream.len()];
    stream.read(0, &mut ids).unwrap();
    ids
}

/// Lines of words with blank lines, indents and characters of several bytes.
fn prose(lines: usize) -> String {
    let line = |i: usize| match i % 7 {
        0 => "\n".to_owned(),
        1 => format!("    the {i} naïve\tthe\n"),
        _ => format!("a line {i} of the 語 text, the end.\n"),
    };
    (0..lines).map(line).collect()
}

#[test]
fn shakespeare_is_split_90_to_10() {
    let corpus = open(&spec(&[Source::TinyShakespeare], &Tokenizer::Bytes, Path::new("/none"))).unwrap();
    assert_eq!((corpus.train.len(), corpus.validation.len()), (1_003_854, 111_540));
    let ids: Vec<i32> = all(&corpus.train).into_iter().chain(all(&corpus.validation)).collect();
    assert!(ids.iter().copied().eq(tiny_shakespeare().iter().map(|&b| i32::from(b))));
}

#[test]
fn several_files_join_and_each_gives_validation_text() {
    let dir = tempfile::tempdir().unwrap();
    let texts: [Vec<u8>; 3] = [(0..100).collect(), (100..110).collect(), (0..=255).collect()];
    let files: Vec<Source> =
        texts.iter().enumerate().map(|(i, text)| write(dir.path(), &i.to_string(), text)).collect();
    let corpus = open(&spec(&files, &Tokenizer::Bytes, dir.path())).unwrap();
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for text in &texts {
        let split = text.len() * 9 / 10;
        train.extend(text[..split].iter().map(|&b| i32::from(b)));
        validation.extend(text[split..].iter().map(|&b| i32::from(b)));
    }
    assert_eq!((all(&corpus.train), all(&corpus.validation)), (train.clone(), validation));
    for start in 0..train.len() - 20 {
        let mut ids = [0; 20];
        corpus.train.read(start, &mut ids).unwrap();
        assert_eq!(ids, train[start..start + 20]);
    }
    assert_eq!(corpus.train.text_bytes(85..105).unwrap(), 20);

    let own = [files[1].clone()];
    let whole = CorpusSpec { validation: Validation::Sources(&own), ..spec(&files, &Tokenizer::Bytes, dir.path()) };
    let corpus = open(&whole).unwrap();
    assert_eq!((corpus.train.len(), corpus.validation.len()), (366, 10));
}

#[test]
fn batches_depend_on_seed_and_step_only() {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<u8> = (0..=255).collect();
    let file = [write(dir.path(), "ramp", &text)];
    let spec = CorpusSpec { validation: Validation::Fraction(0.0), ..spec(&file, &Tokenizer::Bytes, dir.path()) };
    let stream = open(&spec).unwrap().train;
    let get = |seed, step| {
        let (mut x, mut y) = (vec![-1; 3 * 8], vec![-1; 3 * 8]);
        Batches::new(&stream, seed, 3, 8).unwrap().fill(step, &mut x, &mut y).unwrap();
        (x, y)
    };
    assert_eq!(get(1, 5), get(1, 5));
    assert_ne!(get(1, 5), get(1, 6));
    assert_ne!(get(1, 5), get(2, 5));
    assert_ne!(get(1, 5), get(1, 5 + (1 << 32)));
    let mut starts = std::collections::BTreeSet::new();
    for step in 0..2000 {
        let (x, y) = get(9, step);
        assert!(x.iter().zip(&y).all(|(x, y)| x + 1 == *y), "on a ramp the target is the input plus one");
        assert!(x.chunks(8).all(|row| row.windows(2).all(|w| w[0] + 1 == w[1])));
        starts.extend(x.chunks(8).map(|row| row[0]));
    }
    // The last start has T + 1 = 9 tokens: 247..=255. 6000 draws from 248 leave none out (chance 1e-8).
    assert_eq!(starts, (0..=247).collect());
}

#[test]
fn validation_counts_every_token_once() {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<u8> = (0..250).collect();
    let file = [write(dir.path(), "ramp", &text)];
    let own = CorpusSpec { validation: Validation::Sources(&file), ..spec(&file, &Tokenizer::Bytes, dir.path()) };
    let stream = open(&own).unwrap().validation;
    let targets = |windows: &Windows, size| {
        let mut seen = Vec::new();
        for index in 0..windows.batches() {
            let (mut x, mut y) = (vec![0; size], vec![0; size]);
            windows.fill(index, &mut x, &mut y).unwrap();
            assert!(x.iter().zip(&y).all(|(x, y)| x + 1 == *y));
            seen.extend(y);
        }
        assert_eq!((seen.len() as u64, seen.len() as u64), (windows.tokens(), windows.bytes()));
        seen
    };
    // 249 targets = 24 windows of 10; all of them in batches of 4.
    let every = Windows::new(&stream, 4, 10, None).unwrap();
    assert_eq!(targets(&every, 40), (1..=240).collect::<Vec<i32>>());
    // Two batches of 4: every third window.
    let some = targets(&Windows::new(&stream, 4, 10, Some(2)).unwrap(), 40);
    assert_eq!(some.iter().step_by(10).copied().collect::<Vec<_>>(), [1, 31, 61, 91, 121, 151, 181, 211]);
    // 6 windows of 40 for a batch of 8: two come again.
    let few = targets(&Windows::new(&stream, 8, 40, None).unwrap(), 320);
    assert_eq!(few.iter().step_by(40).copied().collect::<Vec<_>>(), [1, 41, 81, 121, 161, 201, 1, 41]);
    assert_eq!(targets(&Windows::new(&stream, 1, 249, None).unwrap(), 249).len(), 249);
}

#[test]
fn bits_per_byte_of_a_uniform_guess() {
    // ln 256 nats on one-byte tokens are 8 bits; the same loss on tokens of 4 bytes is 2 bits a byte.
    assert!((bits_per_byte(256f64.ln(), 10, 10) - 8.0).abs() < 1e-12);
    assert!((bits_per_byte(256f64.ln(), 10, 40) - 2.0).abs() < 1e-12);
}

#[test]
fn tokenised_text_is_what_the_tokenizer_says_and_its_bytes_add_up() {
    let dir = tempfile::tempdir().unwrap();
    // Long enough for several pieces.
    let text = prose(20_000);
    assert!(text.len() > 3 * (128 << 10));
    let file = [write(dir.path(), "t", &text)];
    let tokenizer = byte_bpe();
    let corpus = open(&spec(&file, &tokenizer, &dir.path().join("cache"))).unwrap();
    let ids: Vec<i32> = all(&corpus.train).into_iter().chain(all(&corpus.validation)).collect();
    // The oracle: the text in one piece.
    let whole: Vec<i32> = tokenizer.encode(&text).unwrap().into_iter().map(|id| id as i32).collect();
    assert!(ids == whole, "cutting the text into pieces must not change its ids");
    let bytes = |stream: &Stream| stream.text_bytes(0..stream.len()).unwrap();
    assert_eq!(bytes(&corpus.train) + bytes(&corpus.validation), text.len() as u64);
    // Byte-level: the bytes of a range are the length of its text.
    let some: Vec<u32> = ids[1000..1100].iter().map(|&id| id as u32).collect();
    assert_eq!(corpus.train.text_bytes(1000..1100).unwrap(), tokenizer.decode(&some).unwrap().len() as u64);
    let windows = Windows::new(&corpus.validation, 2, 16, None).unwrap();
    let tail = windows.tokens() as usize + 1;
    assert_eq!(windows.bytes(), corpus.validation.text_bytes(1..tail).unwrap());
}

#[test]
fn the_cache_is_used_again_and_rebuilt_when_it_is_not_whole() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("deep/cache");
    let file = [write(dir.path(), "t", prose(500))];
    let tokenizer = byte_bpe();
    let tokenised = || {
        let mut reports = 0;
        let corpus = Corpus::open(&spec(&file, &tokenizer, &cache), &mut |_, done, total| {
            reports += 1;
            assert!(done <= total);
        });
        (all(&corpus.unwrap().train), reports > 0)
    };
    let (ids, fresh) = tokenised();
    assert!(fresh);
    let names = || std::fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let path = names()[0].clone();
    let good = std::fs::read(&path).unwrap();
    assert_eq!(tokenised(), (ids.clone(), false), "the second time nothing is tokenised");

    let mut broken: Vec<Vec<u8>> = [0, 9, 12, 17, 25, 33, 63, 64, good.len() / 2, good.len() - 1]
        .iter()
        .map(|&at| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            bytes
        })
        .collect();
    broken.extend([Vec::new(), good[..40].to_vec(), good[..good.len() - 3].to_vec(), [&good[..], b"x"].concat()]);
    for bytes in broken {
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(tokenised(), (ids.clone(), true));
        assert_eq!(std::fs::read(&path).unwrap(), good);
    }
    assert_eq!(names().len(), 1, "no temporary file stays");

    write(dir.path(), "t", prose(501));
    assert!(tokenised().1, "changed text is tokenised anew");
    assert_eq!(names().len(), 2);
}

#[test]
fn bad_input_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, bpe, words) = (Tokenizer::Bytes, byte_bpe(), two_words());
    let of = |source: Source, tokenizer: &Tokenizer, vocab| {
        open(&CorpusSpec { vocab, ..spec(&[source], tokenizer, &dir.path().join("cache")) }).unwrap_err()
    };
    let file = |name: &str, content: &[u8]| write(dir.path(), name, content);
    let missing = Source::File(dir.path().join("none"));
    assert!(matches!(of(missing, &bytes, None), DataError::Missing { .. }));
    assert!(matches!(of(Source::File(dir.path().to_owned()), &bytes, None), DataError::NotAFile { .. }));
    assert!(matches!(of(file("empty", b""), &bytes, None), DataError::Empty { bytes: 0, .. }));
    assert!(matches!(of(file("blank", b" \n \n"), &words, None), DataError::Empty { bytes: 4, .. }));
    let latin1 = of(file("latin1", b"fine\nfine\ncaf\xE9 au lait"), &bpe, None);
    assert!(matches!(latin1, DataError::NotUtf8 { byte: 13, line: 3, .. }), "{latin1:?}");
    let refused = of(file("words", b"to be\nor not"), &words, None);
    assert!(matches!(&refused, DataError::Tokenizer { name, .. } if name.ends_with("words")), "{refused:?}");
    let cause = std::error::Error::source(&refused).unwrap().to_string();
    assert!(cause.contains("words.json") && cause.contains("0..12"), "{cause}");
    let high = of(file("ok", b"to be to be"), &words, Some(7));
    assert!(matches!(high, DataError::IdOutOfRange { id: 7, vocab: 7, .. }), "{high:?}");
    assert!(matches!(of(file("high", b"az"), &bytes, Some(100)), DataError::IdOutOfRange { id: 122, .. }));
    assert!(std::fs::read_dir(dir.path().join("cache")).unwrap().all(|e| {
        let name = e.unwrap().file_name();
        name.to_string_lossy().ends_with(".tokens")
    }));

    assert!(matches!(open(&spec(&[], &bytes, dir.path())), Err(DataError::NoSource)));
    for found in [-0.1, 1.0, f64::NAN] {
        let bad = CorpusSpec {
            validation: Validation::Fraction(found),
            ..spec(&[Source::TinyShakespeare], &bytes, dir.path())
        };
        assert!(matches!(open(&bad), Err(DataError::Fraction { .. })));
    }
    let short = open(&spec(&[file("short", b"0123456789")], &bytes, dir.path())).unwrap();
    match Batches::new(&short.train, 0, 2, 9) {
        Err(error @ DataError::TooShort { wanted: 10, found: 9, .. }) => {
            assert!(error.to_string().contains("training text") && error.to_string().contains("short"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(Batches::new(&short.train, 0, 2, 8).is_ok());
    assert!(matches!(Windows::new(&short.validation, 1, 1, None), Err(DataError::TooShort { .. })));
    assert!(matches!(Batches::new(&short.train, 0, 0, 8), Err(DataError::EmptyBatch { .. })));
}

#[test]
fn a_cache_that_cannot_be_written_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = [write(dir.path(), "t", "the")];
    match open(&spec(&file, &byte_bpe(), &dir.path().join("t/under-a-file"))) {
        Err(DataError::Io { action: "write the token cache", path, .. }) => {
            assert!(path.starts_with(dir.path().join("t/under-a-file")));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_that_is_shortened_while_it_is_trained_on_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = [write(dir.path(), "t", [b'x'; 1000])];
    let corpus = open(&spec(&file, &Tokenizer::Bytes, dir.path())).unwrap();
    write(dir.path(), "t", [b'x'; 10]);
    match corpus.train.read(100, &mut [0; 20]) {
        Err(error @ DataError::Io { action: "read", .. }) => {
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert!(cause.contains("became shorter"), "{cause}");
        }
        other => panic!("{other:?}"),
    }
}
