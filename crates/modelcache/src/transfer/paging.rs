//! Paged listings: what ends one whose server gives page after page.

use crate::digest::Digest;
use crate::error::{Error, Result};
use std::collections::HashSet;

/// Pages of one listing. With 1,000 entries a page, as real servers give, ten times the files of the largest artifact.
pub(crate) const PAGES_MAX: usize = 10_000;

/// The pages of one listing so far.
#[derive(Debug, Default)]
pub(crate) struct Paging {
    pages: usize,
    /// Digests of the tokens and last entries seen.
    seen: HashSet<Digest>,
}

impl Paging {
    /// Records a page by its last entry and the token of the next page, as far as it has them.
    ///
    /// # Errors
    /// `Corrupt` where a token or a last entry comes again, since such pages go in a circle, and above [`PAGES_MAX`].
    pub(crate) fn page(&mut self, last: Option<&str>, next: Option<&str>) -> Result<()> {
        self.pages += 1;
        let page = self.pages;
        let no_end = |why: &str| {
            Error::corrupt(format!("the server's listing does not end: {why} (page {page})"))
                .hint("check the server, and any proxy on the way, for answers from a cache")
        };
        let tag_record = [("entry", last), ("token", next)];
        for (what, text) in tag_record.into_iter().filter_map(|(what, text)| Some((what, text?))) {
            if !self.seen.insert(Digest::of(format!("{what} {text}").as_bytes())) {
                return Err(no_end(match what {
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
    fn a_listing_that_goes_in_a_circle_ends_with_an_error() {
        let mut paging = Paging::default();
        paging.page(Some("a"), Some("a")).expect("an entry is no token");
        paging.page(Some("b"), Some("2")).expect("goes on");
        assert!(paging.page(Some("c"), Some("a")).is_err(), "the token of the first page");
        assert!(paging.page(Some("b"), Some("3")).is_err(), "the second page with a new token");
        let mut paging = Paging::default();
        let pages = (0..PAGES_MAX + 1).take_while(|at| paging.page(None, Some(&at.to_string())).is_ok());
        assert_eq!(pages.count(), PAGES_MAX - 1, "empty pages with new tokens");
        Paging::default().page(None, None).expect("an empty listing");
    }
}
