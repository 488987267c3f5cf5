//! The options that messages name, as keyword arguments of the Python package.

use modelcache::option_name::{OptionName, Scope, call};
use modelcache::settings::Setting;

/// Returns the keyword of an option in the Python package. It differs from the option's name mainly where
/// `huggingface_hub` has a name for the same thing.
fn keyword(option: OptionName) -> &'static str {
    match option.name {
        "dir" => "cache_dir",
        "exclude" => "ignore_patterns",
        "include" => "allow_patterns",
        "into" => "local_dir",
        "refresh" => "force_refresh",
        name => name,
    }
}

/// Writes an option of a message: a setting as a keyword of `ModelCache`, an option of a call as a keyword of the
/// method. A setting of another program is written as its variable.
pub(crate) fn write_option(option: OptionName) -> String {
    let variable = Setting::named(option).and_then(|setting| setting.variable);
    if let Some(variable) = variable.filter(|variable| !variable.starts_with("MODEL_CACHE_")) {
        return variable.to_owned();
    }
    let value = match (option.value, option.is_switch) {
        (Some("0"), true) => Some("False".to_owned()),
        (_, true) => Some("True".to_owned()),
        (value, false) => value.map(|value| format!("{value:?}")),
    };
    let keyword = keyword(option);
    match (option.scope, value) {
        (Scope::Setting, value) => format!("ModelCache({keyword}={})", value.as_deref().unwrap_or("…")),
        (Scope::Call, Some(value)) => format!("{keyword}={value}"),
        (Scope::Call, None) => keyword.to_owned(),
    }
}

/// Returns the keyword for a flag of a command, and whether the flag has no value; `None` if there is no such keyword.
pub(crate) fn of_flag(flag: &str) -> Option<(&'static str, bool)> {
    let name = flag.strip_prefix("--")?.replace('-', "_");
    call::ALL.iter().find(|option| option.name == name).map(|option| (keyword(*option), option.is_switch))
}
