//! Configuration files, sizes and durations.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modelcache::config::Environment;
use modelcache::settings::{Settings, parse_duration, parse_size};
use std::collections::BTreeMap;

fuzz_target!(|text: &str| {
    let files = [("modelcache.toml".into(), text.to_owned())];
    let _ = Settings::gather(&BTreeMap::new(), &Environment::default(), &files, |_| Ok(None));
    let _ = (parse_size(text), parse_duration(text));
});
