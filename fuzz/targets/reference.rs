//! References. The printed form of a reference parses to an equal reference.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::Reference;

fuzz_target!(|text: &str| {
    if let Ok(reference) = Reference::parse(text) {
        let printed = reference.to_string();
        let again =
            Reference::parse(&printed).unwrap_or_else(|error| panic!("{text:?} prints as {printed:?}: {error}"));
        assert_eq!(again, reference, "{printed:?}");
        let _ = (reference.exact_key(), reference.pointer());
    }
});
