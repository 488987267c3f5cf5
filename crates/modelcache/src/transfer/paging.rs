//! Bounds on paged listings, so that a listing ends even if the server keeps returning pages.

use crate::digest::Digest;
use crate::error::{Error, Result};
use std::collections::HashSet;

/// Maximum number of pages of one listing. With 1,000 entries per page, as real servers return, this is ten times the
/// files of the largest artifact.
pub(crate) const PAGES_MAX: usize = 10_000;

/// The state of one paged listing.
#[derive(Debug, Default)]
pub(crate) struct Paging {
    pages: usize,
    /// Digests of the continuation tokens and last entries seen so far.
    seen: HashSet<Digest>,
}

impl Paging {
    /// Records a page by its last entry and the token of the next page, if it has them.
    ///
    /// # Errors
    /// `Corrupt` if a token or a last entry repeats, because such pages form a cycle, and above [`PAGES_MAX`] pages.
    pub(crate) fn record_page(&mut self, last: Option<&str>, next: Option<&str>) -> Result<()> {
        self.pages += 1;
        let page = self.pages;
        let no_end = |why: &str| {
            Error::corrupt(format!("the server's listing does not end: {why} (page {page})"))
                .hint("a proxy or cache between this machine and the server may repeat pages; check it and the server")
        };
        let observed = [("entry", last), ("token", next)];
        for (field, text) in observed.into_iter().filter_map(|(field, text)| Some((field, text?))) {
            if !self.seen.insert(Digest::of(format!("{field} {text}").as_bytes())) {
                return Err(no_end(match field {
                    "entry" => "a page ends with the same entry as an earlier one",
                    _ => "the same next page is named again",
                }));
            }
        }
        match next {
            Some(_) if page >= PAGES_MAX => Err(no_end("more pages than any real listing has")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_that_repeats_pages_ends_with_an_error() {
        let mut paging = Paging::default();
        paging.record_page(Some("a"), Some("a")).expect("an entry is no token");
        paging.record_page(Some("b"), Some("2")).expect("goes on");
        assert!(paging.record_page(Some("c"), Some("a")).is_err(), "the token of the first page");
        assert!(paging.record_page(Some("b"), Some("3")).is_err(), "the second page with a new token");
        let mut paging = Paging::default();
        let pages = (0..PAGES_MAX + 1).take_while(|at| paging.record_page(None, Some(&at.to_string())).is_ok());
        assert_eq!(pages.count(), PAGES_MAX - 1, "empty pages with new tokens");
        Paging::default().record_page(None, None).expect("an empty listing");
    }
}
