//! Credentials for web servers, from the configuration file and the netrc.
//!
//! A configured credential applies to one scheme, host and port. A netrc has only machine names, so its entries apply
//! to `https` on any port, and never to plain `http`. A credential for `http` must be in the configuration file. This
//! module reads no files: front ends pass their contents.

use crate::config::Secret;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use url::Url;

/// A credential for a web server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// `Authorization: Bearer …`
    Bearer(Secret),
    /// `Authorization: Basic …`
    Basic {
        /// The user name.
        username: String,
        /// The password.
        password: Secret,
    },
}

/// All credentials for web servers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// The configured credentials by scheme, host and port, in the serialization of [`url::Origin`].
    configured: BTreeMap<String, Credential>,
    netrc: Netrc,
}

/// The credential for a URL, and its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<'a> {
    /// A credential from the configuration file.
    Configured(&'a Credential),
    /// A credential from the netrc.
    Netrc(&'a Credential),
    /// The netrc has a credential, but it is not sent, because the URL is plain `http`.
    Withheld,
    /// There is no credential for this URL.
    None,
}

impl Credentials {
    /// Adds the credential for `server`, a URL of only scheme, host and port. A second credential for a server is
    /// ignored.
    pub fn add(&mut self, server: &str, credential: Credential) -> Result<()> {
        let refuse = || {
            Error::invalid("is not a scheme, host and port")
                .hint("for example [credentials.\"https://registry.example\"]")
        };
        let url = Url::parse(server).map_err(|_| refuse())?;
        let bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
        if !matches!(url.scheme(), "https" | "http") || !bare || !url.username().is_empty() || url.password().is_some()
        {
            return Err(refuse());
        }
        self.configured.entry(url.origin().ascii_serialization()).or_insert(credential);
        Ok(())
    }

    /// Sets the netrc.
    pub fn set_netrc(&mut self, netrc: Netrc) {
        self.netrc = netrc;
    }

    /// Records that other users may read the netrc, so that a warning is logged when one of its entries is sent.
    pub fn mark_netrc_readable_by_others(&mut self) {
        self.netrc.readable_by_others = true;
    }

    /// Returns the credential for `url`.
    pub fn choose(&self, url: &Url) -> Choice<'_> {
        if let Some(credential) = self.configured.get(&url.origin().ascii_serialization()) {
            return Choice::Configured(credential);
        }
        match (url.host_str().and_then(|host| self.netrc.credential_for(host)), url.scheme()) {
            (Some(credential), "https") => Choice::Netrc(credential),
            (Some(_), _) => Choice::Withheld,
            (None, _) => Choice::None,
        }
    }

    /// Returns true if other users may read the netrc.
    pub fn is_netrc_readable_by_others(&self) -> bool {
        self.netrc.readable_by_others
    }
}

/// A parsed netrc.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Netrc {
    /// The credentials by machine; `None` for a machine without a password, to which not even the default is sent.
    machines: BTreeMap<String, Option<Credential>>,
    /// The credential for machines that are not listed.
    default: Option<Credential>,
    /// True if users other than the owner may read the file.
    readable_by_others: bool,
}

/// An entry that is being parsed.
#[derive(Default)]
struct Entry {
    /// The machine; `None` for the `default` entry.
    machine: Option<String>,
    login: Option<String>,
    password: Option<String>,
}

impl Netrc {
    /// Parses a netrc with the keywords `machine`, `default`, `login`, `user`, `password` and `account`. Values may be
    /// quoted. Comments and macros are skipped.
    ///
    /// # Errors
    /// Fails on an unknown keyword. The message has the line number but not the text, which may be a part of a
    /// password.
    pub fn parse(text: &str) -> Result<Self> {
        let mut netrc = Self::default();
        let mut entry: Option<Entry> = None;
        let mut words = Tokenizer { rest: text, line: 1 };
        while let Some((word, quoted)) = words.next()? {
            let refuse = |line: usize, why: &str| Error::invalid(format!("line {line}: {why}"));
            match word.as_str() {
                _ if !quoted && word.starts_with('#') => words.skip_line(),
                "macdef" => words.skip_macro(),
                "default" => {
                    netrc.add(entry.replace(Entry::default()));
                }
                "machine" | "login" | "user" | "password" | "account" => {
                    let Some((value, _)) = words.next()? else {
                        return Err(refuse(words.line, "the last keyword has no value"));
                    };
                    match (word.as_str(), &mut entry) {
                        ("machine", _) => {
                            let machine = Some(value.to_ascii_lowercase());
                            netrc.add(entry.replace(Entry { machine, ..Entry::default() }));
                        }
                        (_, None) => return Err(refuse(words.line, "a value before the first machine")),
                        ("password", Some(entry)) => entry.password = Some(value),
                        ("account", _) => {}
                        (_, Some(entry)) => entry.login = Some(value),
                    }
                }
                _ => {
                    return Err(refuse(words.line, "not a netrc keyword (a password with spaces needs quotes)"));
                }
            }
        }
        netrc.add(entry);
        Ok(netrc)
    }

    /// Adds a complete entry; `None` adds nothing. A second entry for a machine is ignored.
    fn add(&mut self, entry: Option<Entry>) {
        let Some(Entry { machine, login, password }) = entry else { return };
        let credential = password
            .map(|password| Credential::Basic { username: login.unwrap_or_default(), password: Secret::new(password) });
        match machine {
            Some(machine) => {
                self.machines.entry(machine).or_insert(credential);
            }
            None => self.default = self.default.take().or(credential),
        }
    }

    /// Returns the credential for `host`, or the default if the netrc does not list the host.
    fn credential_for(&self, host: &str) -> Option<&Credential> {
        match self.machines.get(host) {
            Some(credential) => credential.as_ref(),
            None => self.default.as_ref(),
        }
    }
}

/// A tokenizer for netrc files.
struct Tokenizer<'a> {
    /// The text that was not read yet.
    rest: &'a str,
    /// The number of its first line, starting at 1.
    line: usize,
}

impl Tokenizer<'_> {
    fn skip(&mut self, bytes: usize) {
        self.line += self.rest[..bytes].matches('\n').count();
        self.rest = &self.rest[bytes..];
    }

    fn skip_line(&mut self) {
        self.skip(self.rest.find('\n').unwrap_or(self.rest.len()));
    }

    /// Skips a macro, which ends at an empty line.
    fn skip_macro(&mut self) {
        let is_empty_line = |at: &usize| self.rest[at + 1..].trim_start_matches('\r').starts_with('\n');
        let end = self.rest.match_indices('\n').map(|(at, _)| at).find(is_empty_line);
        self.skip(end.unwrap_or(self.rest.len()));
    }

    /// Returns the next word, and whether it was quoted.
    fn next(&mut self) -> Result<Option<(String, bool)>> {
        self.skip(self.rest.len() - self.rest.trim_start().len());
        let Some(quoted) = self.rest.strip_prefix('"') else {
            let end = self.rest.find(char::is_whitespace).unwrap_or(self.rest.len());
            let word = self.rest[..end].to_owned();
            self.skip(end);
            return Ok((!word.is_empty()).then_some((word, false)));
        };
        let (mut word, mut escaped) = (String::new(), false);
        for (at, c) in quoted.char_indices() {
            match (escaped, c) {
                (false, '"') => {
                    self.skip(at + 2);
                    return Ok(Some((word, true)));
                }
                (false, '\\') => escaped = true,
                (true, 'n') => (word, escaped) = (word + "\n", false),
                (true, 'r') => (word, escaped) = (word + "\r", false),
                (true, 't') => (word, escaped) = (word + "\t", false),
                (_, c) => {
                    word.push(c);
                    escaped = false;
                }
            }
        }
        Err(Error::invalid(format!("line {}: a quote is not closed", self.line)))
    }
}

#[cfg(test)]
impl Choice<'_> {
    /// Formats the choice with its secret, for tests.
    pub(crate) fn expose(&self) -> String {
        let open = |credential: &Credential| match credential {
            Credential::Bearer(token) => token.expose().to_owned(),
            Credential::Basic { username, password } => format!("{username}:{}", password.expose()),
        };
        match self {
            Self::Configured(credential) => format!("configured {}", open(credential)),
            Self::Netrc(credential) => format!("netrc {}", open(credential)),
            Self::Withheld => "withheld".into(),
            Self::None => "none".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn basic(username: &str, password: &str) -> Credential {
        Credential::Basic { username: username.into(), password: Secret::new(password) }
    }

    fn choose<'a>(credentials: &'a Credentials, url: &str) -> Choice<'a> {
        credentials.choose(&Url::parse(url).expect(url))
    }

    #[test]
    fn a_netrc_is_read_as_curl_reads_it() {
        let text = "# a comment with machine evil in it\nmachine A.example login ann password \"p w\\\"#\\\\\"\n\
             macdef init\nmachine inside macro\n\nmachine b.example\n\tlogin bob\n\taccount x\n\tpassword #hash\n\
             machine b.example login late password late\nmachine none.example login only\n\
             default login any password common\n";
        for text in [text.to_owned(), text.replace('\n', "\r\n")] {
            let mut credentials = Credentials::default();
            credentials.set_netrc(Netrc::parse(&text).expect("reads"));
            assert_eq!(choose(&credentials, "https://a.example/x"), Choice::Netrc(&basic("ann", "p w\"#\\")));
            assert_eq!(choose(&credentials, "https://b.example:8443/x"), Choice::Netrc(&basic("bob", "#hash")));
            assert_eq!(choose(&credentials, "https://c.example/x"), Choice::Netrc(&basic("any", "common")));
            assert_eq!(choose(&credentials, "https://none.example/x"), Choice::None, "not the default");
            assert_eq!(choose(&credentials, "http://a.example/x"), Choice::Withheld);
        }
    }

    #[test]
    fn an_invalid_netrc_is_refused_with_its_line_and_without_its_text() {
        for (bad, line) in [
            ("machine a login b password c canary", "line 1"),
            ("machine a\n login \"canary", "line 2"),
            ("login canary", "line 1"),
            ("machine a\npassword", "line 2"),
        ] {
            let error = Netrc::parse(bad).expect_err(bad);
            assert!(error.message().contains(line) && !error.to_string().contains("canary"), "{error}");
        }
        assert_eq!(Netrc::parse("").expect("empty"), Netrc::default());
    }

    #[test]
    fn a_configured_credential_is_for_one_scheme_host_and_port() {
        let mut credentials = Credentials::default();
        credentials.set_netrc(Netrc::parse("default login d password d").expect("reads"));
        let bearer = Credential::Bearer(Secret::new("canary"));
        credentials.add("https://R.example/", bearer.clone()).expect("added");
        credentials.add("https://r.example:443", basic("late", "late")).expect("ignored");
        assert_eq!(choose(&credentials, "https://r.example:443/x"), Choice::Configured(&bearer));
        assert_eq!(choose(&credentials, "http://r.example/x"), Choice::Withheld);
        assert!(matches!(choose(&credentials, "https://r.example:444/x"), Choice::Netrc(_)));
        for bad in ["r.example", "ftp://r", "https://u:p@r", "https://r/path", "https://r?x", "https://"] {
            assert!(credentials.add(bad, bearer.clone()).is_err(), "{bad} was accepted");
        }
        assert!(!format!("{credentials:?}").contains("canary"));
    }

    proptest! {
        #[test]
        fn reading_a_netrc_never_panics(text in "(machine|login|password|default|macdef|#|\"|\\\\|\n| |é|a){0,30}") {
            let _ = Netrc::parse(&text);
        }
    }
}
