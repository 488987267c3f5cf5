//! Routing: parses the path of a request.
//!
//! Paths are split before they are decoded, because a revision such as `refs%2Fpr%2F1` is one segment. A repo name has
//! one or two segments; the segment after it shows which.

use percent_encoding::percent_decode_str;

use super::repo::{RepoId, RepoKind};

/// A parsed request path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Info { repo: RepoId, revision: String },
    Tree { repo: RepoId, revision: String, folder: String },
    PathsInfo { repo: RepoId, revision: String },
    Refs { repo: RepoId },
    Commits { repo: RepoId, revision: String },
    AuthCheck { repo: RepoId },
    Resolve { repo: RepoId, revision: String, file: String },
    WhoAmI,
    Unknown,
}

/// Parses a path that is still percent-encoded.
pub(super) fn route(path: &str) -> Route {
    let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let found = match segments.as_slice() {
        ["api", "whoami-v2"] => Some(Route::WhoAmI),
        ["api", "models", rest @ ..] => api(RepoKind::Model, rest),
        ["api", "datasets", rest @ ..] => api(RepoKind::Dataset, rest),
        ["api", "spaces", rest @ ..] => api(RepoKind::Space, rest),
        ["api", ..] => None,
        ["datasets", rest @ ..] => resolve(RepoKind::Dataset, rest),
        ["spaces", rest @ ..] => resolve(RepoKind::Space, rest),
        rest => resolve(RepoKind::Model, rest),
    };
    found.unwrap_or(Route::Unknown)
}

fn api(kind: RepoKind, segments: &[&str]) -> Option<Route> {
    const WORDS: [&str; 6] = ["revision", "tree", "paths-info", "refs", "commits", "auth-check"];
    let is_word = |at: usize| segments.get(at).is_some_and(|word| WORDS.contains(word));
    // `/api/models/gpt2/tree/…`: a known word as the second segment means that the name has one segment.
    let repo_len = if is_word(1) { 1 } else { segments.len().min(2) };
    let (repo, rest) = segments.split_at(repo_len);
    let repo = repo_id(kind, repo)?;
    Some(match rest {
        [] => Route::Info { repo, revision: "main".to_owned() },
        ["revision", revision] => Route::Info { repo, revision: decode(revision)? },
        ["tree", revision] => Route::Tree { repo, revision: decode(revision)?, folder: String::new() },
        ["tree", revision, folder @ ..] => {
            Route::Tree { repo, revision: decode(revision)?, folder: decode(&folder.join("/"))? }
        }
        ["paths-info", revision] => Route::PathsInfo { repo, revision: decode(revision)? },
        ["refs"] => Route::Refs { repo },
        ["commits", revision] => Route::Commits { repo, revision: decode(revision)? },
        ["auth-check"] => Route::AuthCheck { repo },
        _ => return None,
    })
}

fn resolve(kind: RepoKind, segments: &[&str]) -> Option<Route> {
    let at = segments.iter().take(3).position(|word| *word == "resolve")?;
    let (repo, rest) = segments.split_at(at);
    let repo = repo_id(kind, repo)?;
    match rest {
        [_, revision, file @ ..] if !file.is_empty() => {
            Some(Route::Resolve { repo, revision: decode(revision)?, file: decode(&file.join("/"))? })
        }
        _ => None,
    }
}

fn repo_id(kind: RepoKind, segments: &[&str]) -> Option<RepoId> {
    let name = decode(&segments.join("/"))?;
    (!name.is_empty() && segments.len() <= 2).then_some(RepoId { kind, name })
}

pub(super) fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(Into::into)
}

/// Returns the values of `name` in a query or form body.
pub(super) fn values(query: &str, name: &str) -> Vec<String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('=').or(Some((pair, ""))));
    let named = pairs.filter(|(key, _)| decode(key).is_some_and(|key| key == name));
    named.filter_map(|(_, value)| decode(&value.replace('+', " "))).collect()
}

/// Returns true if the boolean parameter `name` is `true` (in upper or lower case) or `1`.
pub(super) fn is_set(query: &str, name: &str) -> bool {
    values(query, name).iter().any(|value| value.eq_ignore_ascii_case("true") || value == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_and_two_segment_repos_are_distinguished() {
        let info = |name: &str| Route::Info { repo: RepoId::of(name), revision: "main".to_owned() };
        assert_eq!(route("/api/models/gpt2"), info("gpt2"));
        assert_eq!(route("/api/models/org/model"), info("org/model"));
        assert_eq!(route("/api/datasets/org/set"), info("datasets/org/set"));
        let tree = |name: &str, revision: &str, folder: &str| Route::Tree {
            repo: RepoId::of(name),
            revision: revision.to_owned(),
            folder: folder.to_owned(),
        };
        assert_eq!(route("/api/models/gpt2/tree/main"), tree("gpt2", "main", ""));
        assert_eq!(route("/api/models/o/m/tree/refs%2Fpr%2F1/a%2Fb"), tree("o/m", "refs/pr/1", "a/b"));
        assert_eq!(route("/api/models/o/m/tree/refs/pr/1"), tree("o/m", "refs", "pr/1"));
        let file = |name: &str, revision: &str, file: &str| Route::Resolve {
            repo: RepoId::of(name),
            revision: revision.to_owned(),
            file: file.to_owned(),
        };
        assert_eq!(route("/gpt2/resolve/main/a/b.txt"), file("gpt2", "main", "a/b.txt"));
        assert_eq!(route("/o/m/resolve/refs%2Fpr%2F1/f%C3%A9%25.txt"), file("o/m", "refs/pr/1", "fé%.txt"));
        assert_eq!(route("/spaces/o/m/resolve/main/app.py"), file("spaces/o/m", "main", "app.py"));
        assert_eq!(route("/o/m/resolve/main"), Route::Unknown);
        assert_eq!(route("/api/telemetry/x"), Route::Unknown);
        assert_eq!(route("/o/m/resolve/main/%ff"), Route::Unknown);
    }

    #[test]
    fn booleans_are_read_without_case() {
        assert!(is_set("recursive=True&expand=false", "recursive"));
        assert!(!is_set("recursive=True&expand=false", "expand"));
        assert_eq!(values("paths=a+b&paths=c%2Fd", "paths"), ["a b", "c/d"]);
    }
}
