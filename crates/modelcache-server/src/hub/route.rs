//! The paths of the Hub.
//!
//! A path is split before it is decoded, because a revision such as `refs%2Fpr%2F1` is one segment. The name of a
//! repository has one or two segments; the word after them, such as `resolve` or `tree`, shows where it ends.

use modelcache::config::encode_segment;
use percent_encoding::percent_decode_str;

/// A repository, as paths and references name it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Repo {
    /// The kind in API paths: `models`, `datasets`, `spaces`.
    pub(crate) kind: &'static str,
    /// `org/name`, or one segment.
    pub(crate) id: String,
}

impl Repo {
    /// Returns the prefix of the repository in file URLs and references.
    pub(crate) fn prefix(&self) -> &'static str {
        match self.kind {
            "datasets" => "datasets/",
            "spaces" => "spaces/",
            _ => "",
        }
    }

    /// Returns the path of the repository in the API.
    pub(crate) fn api_path(&self) -> String {
        format!("api/{}/{}", self.kind, self.id)
    }

    /// Returns the reference to a revision.
    pub(crate) fn reference(&self, revision: &str) -> String {
        format!("hf://{}{}@{}", self.prefix(), self.id, encode_segment(revision))
    }
}

/// A request to the Hub, by its path.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The description of a revision.
    Info { repo: Repo, revision: String },
    /// The files below a folder.
    Tree { repo: Repo, revision: String, folder: String },
    /// The entries of named paths.
    PathsInfo { repo: Repo, revision: String },
    /// Another call about a repository, which only the Hub can answer.
    Other { repo: Repo },
    /// A call about the caller.
    WhoAmI,
    /// A file.
    Resolve { repo: Repo, revision: String, file: String },
}

/// Parses a path that is still percent-encoded. Returns `None` if it is not one of the Hub.
pub(crate) fn parse(path: &str) -> Option<Route> {
    let segments: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    // Refuse `.` and `..` segments, and `\`, which URL parsers treat as `/`. They are resolved when the request is
    // passed on, which would then reach another path of the Hub.
    let is_dots = |segment: &&str| matches!(&*percent_decode_str(segment).collect::<Vec<u8>>(), b"." | b"..");
    if segments.iter().any(|segment| is_dots(segment) || segment.contains('\\')) {
        return None;
    }
    match segments.as_slice() {
        ["api", "whoami-v2"] => Some(Route::WhoAmI),
        ["api", "models", rest @ ..] => api("models", rest),
        ["api", "datasets", rest @ ..] => api("datasets", rest),
        ["api", "spaces", rest @ ..] => api("spaces", rest),
        ["api", ..] => None,
        ["datasets", rest @ ..] => resolve("datasets", rest),
        ["spaces", rest @ ..] => resolve("spaces", rest),
        rest => resolve("models", rest),
    }
}

fn api(kind: &'static str, segments: &[&str]) -> Option<Route> {
    const WORDS: [&str; 7] = ["revision", "tree", "paths-info", "refs", "commits", "auth-check", "discussions"];
    // A known word as the second segment means that the name has one segment.
    let one = segments.get(1).is_some_and(|word| WORDS.contains(word));
    let (name, rest) = segments.split_at(if one { 1 } else { segments.len().min(2) });
    let repo = repo(kind, name)?;
    Some(match rest {
        [] => Route::Info { repo, revision: "main".into() },
        ["revision", revision] => Route::Info { repo, revision: decode(revision)? },
        ["tree", revision] => Route::Tree { repo, revision: decode(revision)?, folder: String::new() },
        ["tree", revision, folder @ ..] => {
            Route::Tree { repo, revision: decode(revision)?, folder: decode(&folder.join("/"))? }
        }
        ["paths-info", revision] => Route::PathsInfo { repo, revision: decode(revision)? },
        ["refs"] | ["auth-check"] | ["commits", _] | ["discussions", ..] => Route::Other { repo },
        _ => return None,
    })
}

fn resolve(kind: &'static str, segments: &[&str]) -> Option<Route> {
    let at = segments.iter().take(3).position(|word| *word == "resolve")?;
    let (name, rest) = segments.split_at(at);
    match rest {
        [_, revision, file @ ..] if !file.is_empty() => Some(Route::Resolve {
            repo: repo(kind, name)?,
            revision: decode(revision)?,
            file: decode(&file.join("/"))?,
        }),
        _ => None,
    }
}

/// Returns the repository of a name that consists of one or two segments with the characters that the Hub allows.
fn repo(kind: &'static str, segments: &[&str]) -> Option<Repo> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_segment = |text: &&str| !text.is_empty() && text.chars().all(is_allowed) && !matches!(*text, "." | "..");
    let is_name = matches!(segments.len(), 1 | 2) && segments.iter().all(is_segment);
    is_name.then(|| Repo { kind, id: segments.join("/") })
}

fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(Into::into)
}

/// Returns the values of `name` in a query or a form.
pub(crate) fn values(query: &str, name: &str) -> Vec<String> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let named = pairs.filter(|(key, _)| decode(key).is_some_and(|key| key == name));
    named.filter_map(|(_, value)| decode(&value.replace('+', " "))).collect()
}

/// Returns true if the switch `name` has the value `1`, or `true` in upper or lower case.
pub(crate) fn is_set(query: &str, name: &str) -> bool {
    values(query, name).iter().any(|value| value.eq_ignore_ascii_case("true") || value == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(id: &str) -> Repo {
        Repo { kind: "models", id: id.into() }
    }

    #[test]
    fn names_have_one_or_two_segments_and_revisions_may_have_slashes() {
        let info = |id: &str| Some(Route::Info { repo: model(id), revision: "main".into() });
        assert_eq!(parse("/api/models/gpt2"), info("gpt2"));
        assert_eq!(parse("/api/models/org/model"), info("org/model"));
        let tree = |id: &str, revision: &str, folder: &str| {
            Some(Route::Tree { repo: model(id), revision: revision.into(), folder: folder.into() })
        };
        assert_eq!(parse("/api/models/gpt2/tree/main"), tree("gpt2", "main", ""));
        assert_eq!(parse("/api/models/o/m/tree/refs%2Fpr%2F1/a%2Fb"), tree("o/m", "refs/pr/1", "a/b"));
        let file = |repo: Repo, revision: &str, file: &str| {
            Some(Route::Resolve { repo, revision: revision.into(), file: file.into() })
        };
        assert_eq!(parse("/gpt2/resolve/main/a/b.txt"), file(model("gpt2"), "main", "a/b.txt"));
        assert_eq!(parse("/o/m/resolve/refs%2Fpr%2F1/f%C3%A9%25.txt"), file(model("o/m"), "refs/pr/1", "fé%.txt"));
        let dataset = Repo { kind: "datasets", id: "o/d".into() };
        assert_eq!(parse("/datasets/o/d/resolve/main/x"), file(dataset.clone(), "main", "x"));
        assert_eq!(dataset.reference("refs/pr/1"), "hf://datasets/o/d@refs%2Fpr%2F1");
    }

    #[test]
    fn other_paths_are_not_those_of_the_hub() {
        for path in [
            "/",
            "/o/m",
            "/o/m/resolve/main",
            "/a/b/c/resolve/main/f",
            "/../m/resolve/main/f",
            "/o/%2e%2e/resolve/main/f",
            "/o/m/resolve/main/../f",
            "/api/models/o/m/discussions/../../../../x",
            "/api/models/o/m/commits/%2E%2e",
            "/api/models/o/m/discussions/..\\x",
            "/api/agent-harnesses",
            "/api/telemetry/x",
            "/api/models",
            "/api/models/o/m/unknown",
            "/o/m/resolve/main/%ff",
        ] {
            assert_eq!(parse(path), None, "{path}");
        }
    }

    #[test]
    fn queries_are_read_as_the_clients_write_them() {
        assert!(is_set("recursive=True&expand=false", "recursive") && !is_set("recursive=True&expand=false", "expand"));
        assert_eq!(values("paths=a+b&paths=c%2Fd", "paths"), ["a b", "c/d"]);
    }
}
