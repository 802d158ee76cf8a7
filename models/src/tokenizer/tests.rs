use super::*;

/// The printable stand-ins of bytes in byte-level tokenizers (GPT-2's `bytes_to_unicode`).
fn byte_char(byte: u8) -> char {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let b = u32::from(byte);
    if printable(b) {
        return char::from(byte);
    }
    char::from_u32(256 + (0..b).filter(|&x| !printable(x)).count() as u32).unwrap()
}

/// A byte-level BPE of 256 bytes and a few merges, with a truncation that must not be obeyed.
pub(crate) fn byte_bpe() -> Tokenizer {
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        (0..=255u8).map(|b| (byte_char(b).to_string(), b.into())).collect();
    let merges = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["Ġ", "a"]];
    for (i, [a, b]) in merges.iter().enumerate() {
        vocab.insert(format!("{a}{b}"), (256 + i).into());
    }
    let json = serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    });
    Tokenizer::from_json("bpe.json", json.to_string().into_bytes()).unwrap()
}

/// Knows two words and has no unknown token, so it refuses every other text.
pub(crate) fn two_words() -> Tokenizer {
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"to": 0, "be": 7}, "unk_token": "[none]"},
    });
    Tokenizer::from_json("words.json", json.to_string().into_bytes()).unwrap()
}

const TEXT: &str = "the cat, a hat — naïve 語 🙂 the  end\n\nthe";

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    parts.push(stream.finish().unwrap());
    parts
}

#[test]
fn text_comes_back() {
    for tokenizer in [Tokenizer::Bytes, byte_bpe()] {
        let ids = tokenizer.encode(TEXT).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    }
    assert_eq!(byte_bpe().vocab_size(), 260);
    assert_eq!(byte_bpe().encode("the the").unwrap(), [257, 258]);
    assert_eq!(two_words().vocab_size(), 8, "ids may have gaps");
}

#[test]
fn streams_give_the_text_in_whole_characters() {
    let mut long = TEXT.repeat(40);
    long.push_str("語🙂");
    for tokenizer in [Tokenizer::Bytes, byte_bpe()] {
        let parts = streamed(&tokenizer, &tokenizer.encode(&long).unwrap());
        assert_eq!(parts.concat(), long);
        assert!(parts.iter().all(|p| !p.contains('\u{FFFD}')));
    }
}

#[test]
fn bytes_that_are_not_utf8_are_shown_as_replacement_characters() {
    // Lone continuation bytes, a cut three-byte character before ASCII, an overlong form, and a cut one at the end.
    let bytes = b"a\x80\x80b\xE8\xAAc\xC0\xAF\xF0\x9F\x99\x82\xED\xA0\x80\xFF\xF0\x9F";
    let ids: Vec<u32> = bytes.iter().map(|&b| b.into()).collect();
    let want = String::from_utf8_lossy(bytes);
    for tokenizer in [Tokenizer::Bytes, byte_bpe()] {
        assert_eq!(tokenizer.decode(&ids).unwrap(), want);
        assert_eq!(streamed(&tokenizer, &ids).concat(), want, "{}", tokenizer.name());
    }
    assert_eq!(Tokenizer::Bytes.decode(&[65, 256]).unwrap(), "A\u{FFFD}");
}

#[test]
fn random_bytes_stream_to_what_the_standard_library_shows() {
    let mut state = 7u32;
    let mut bytes = Vec::new();
    for _ in 0..4000 {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        // Mostly bytes above 0x7F, so that every kind of broken sequence occurs.
        bytes.push(if state >> 30 == 0 { (state >> 8) as u8 & 0x7F } else { (state >> 8) as u8 | 0x80 });
    }
    let ids: Vec<u32> = bytes.iter().map(|&b| b.into()).collect();
    assert_eq!(streamed(&Tokenizer::Bytes, &ids).concat(), String::from_utf8_lossy(&bytes));
}

#[test]
fn every_byte_of_the_text_belongs_to_one_token() {
    for tokenizer in [Tokenizer::Bytes, byte_bpe()] {
        for encoded in tokenizer.encode_pieces(&[TEXT, "  ", "語"], 0).unwrap().iter().zip([TEXT, "  ", "語"]) {
            assert_eq!(encoded.0.bytes.iter().sum::<usize>(), encoded.1.len());
            assert_eq!(encoded.0.bytes.len(), encoded.0.ids.len());
        }
    }
}

#[test]
fn refusals_are_typed_and_name_the_place() {
    let words = two_words();
    assert_eq!(words.encode("to be to").unwrap(), [0, 7, 0]);
    match words.encode_pieces(&["to be ", "or not "], 100) {
        Err(TokenizerError::Refused { name, start, end, .. }) => {
            assert_eq!((name.as_str(), start, end), ("words.json", 106, 113));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(Tokenizer::from_json("x", b"{}".to_vec()), Err(TokenizerError::Parse { .. })));
    assert!(matches!(Tokenizer::from_json("x", b"\xFF\xFE".to_vec()), Err(TokenizerError::Parse { .. })));
    assert!(matches!(Tokenizer::from_file(Path::new("/none.json")), Err(TokenizerError::Read { .. })));
}

#[test]
fn fingerprints_follow_the_content() {
    let again = Tokenizer::from_json("other name", byte_bpe().json().unwrap().to_vec()).unwrap();
    assert_eq!(byte_bpe().fingerprint(), again.fingerprint());
    assert_ne!(byte_bpe().fingerprint(), two_words().fingerprint());
    assert_eq!(Tokenizer::Bytes.fingerprint(), "bytes");
}
