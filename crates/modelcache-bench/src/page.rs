//! Writes docs/benchmarks.md: hand-written text, the machine, and one section per row.
//!
//! The hand-written text is in `frame.md` beside this module. A row that was not measured keeps its section from the
//! existing page.

use super::chart::Chart;
use anyhow::{Context, Result};
use std::fs;
use xtask::repository::root;
use xtask::table;

const PAGE: &str = "docs/benchmarks.md";
/// The folder of the charts.
const CHARTS: &str = "docs";
const FRAME: &str = include_str!("frame.md");

/// The section of one row.
pub(super) struct Section {
    /// Name of the row, as in `--only`.
    pub(super) row: &'static str,
    pub(super) title: String,
    /// What is measured and under which conditions, in a few sentences.
    pub(super) what: String,
    pub(super) tables: Vec<String>,
    /// Written beside the page.
    pub(super) charts: Vec<Chart>,
    pub(super) targets: Vec<Target>,
    /// Remarks that a reader needs to interpret the figures.
    pub(super) notes: Vec<String>,
}

/// A target of a row and the measured value.
pub(super) struct Target {
    name: String,
    /// `None` if it could not be measured.
    measured: Option<f64>,
    unit: &'static str,
    required: f64,
    /// A stricter value.
    goal: Option<f64>,
    more_is_better: bool,
}

impl Target {
    pub(super) fn at_least(
        name: &str,
        measured: Option<f64>,
        unit: &'static str,
        required: f64,
        goal: Option<f64>,
    ) -> Self {
        Self { name: name.to_owned(), measured, unit, required, goal, more_is_better: true }
    }

    pub(super) fn at_most(
        name: &str,
        measured: Option<f64>,
        unit: &'static str,
        required: f64,
        goal: Option<f64>,
    ) -> Self {
        Self { name: name.to_owned(), measured, unit, required, goal, more_is_better: false }
    }

    /// Returns the cell in the column `reached`.
    fn verdict(&self) -> &'static str {
        let Some(measured) = self.measured else { return "not measured" };
        let holds = |bound: f64| if self.more_is_better { measured >= bound } else { measured <= bound };
        match self.goal {
            Some(goal) if holds(goal) => "goal",
            _ if holds(self.required) => "yes",
            _ => "**no**",
        }
    }

    fn cells(&self) -> Vec<String> {
        let sign = if self.more_is_better { ">=" } else { "<=" };
        let unit = self.unit;
        vec![
            self.name.clone(),
            self.measured.map_or_else(String::new, |measured| format!("{measured:.3}{unit}")),
            format!("{sign} {}{unit}", self.required),
            self.goal.map_or_else(String::new, |goal| format!("{sign} {goal}{unit}")),
            self.verdict().into(),
        ]
    }
}

impl Section {
    /// Formats the section as Markdown that is also readable on a terminal.
    pub(super) fn text(&self) -> String {
        let mut text = format!("## {}\n\n{}\n", self.title, self.what);
        self.tables.iter().filter(|table| !table.is_empty()).for_each(|table| text += &format!("\n{table}"));
        self.charts.iter().for_each(|chart| text += &format!("\n{}", chart.markdown()));
        if !self.targets.is_empty() {
            let targets: Vec<_> = self.targets.iter().map(Target::cells).collect();
            text += &format!("\n{}", table::markdown(&["target", "measured", "required", "goal", "reached"], &targets));
        }
        self.notes.iter().for_each(|note| text += &format!("\n- {note}"));
        if !self.notes.is_empty() {
            text.push('\n');
        }
        text
    }
}

/// Writes the page with these sections; other rows keep theirs. `rows` is the order of all rows. The first line of
/// `machine` states the date and the number of rounds, and the other lines describe the machine.
pub(super) fn write(rows: &[&str], sections: &[Section], machine: &str) -> Result<()> {
    let path = root().join(PAGE);
    let existing = fs::read_to_string(&path).unwrap_or_default();
    for chart in sections.iter().flat_map(|section| &section.charts) {
        chart.write(&root().join(CHARTS))?;
    }
    fs::write(&path, page(&existing, rows, sections, machine)).with_context(|| format!("cannot write {PAGE}"))?;
    println!("{PAGE}: written");
    Ok(())
}

fn page(existing: &str, rows: &[&str], sections: &[Section], machine: &str) -> String {
    let section = |row: &&str| {
        // Comments delimit the sections, so that a section can be copied from the existing page.
        let [begin, end] = [format!("<!-- row {row} -->\n"), format!("<!-- end {row} -->\n")];
        let body = match sections.iter().find(|section| section.row == *row) {
            Some(section) => format!("{}\nMeasured {}.\n", section.text(), machine.lines().next().unwrap_or_default()),
            None => existing.split_once(&begin)?.1.split_once(&end)?.0.to_owned(),
        };
        Some(format!("{begin}{body}{end}"))
    };
    let all: Vec<String> = rows.iter().filter_map(section).collect();
    FRAME
        .replace("{{machine}}", machine.split_once('\n').map_or("", |(_, rest)| rest).trim())
        .replace("{{rows}}\n", &all.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(row: &'static str, what: &str) -> Section {
        let (tables, charts, targets, notes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Section { row, title: row.into(), what: what.into(), tables, charts, targets, notes }
    }

    #[test]
    fn a_row_that_was_not_measured_keeps_its_section() {
        let first = page("", &["a", "b"], &[section("a", "old a"), section("b", "old b")], "today\nmachine");
        let second = page(&first, &["a", "b"], &[section("b", "new b")], "today\nmachine");
        assert!(second.contains("old a") && second.contains("new b") && !second.contains("old b"), "{second}");
        assert!(second.find("old a") < second.find("new b"));
    }

    #[test]
    fn the_page_contains_the_frame() {
        let existing = fs::read_to_string(root().join(PAGE)).expect("the page");
        let rows: Vec<&str> =
            existing.lines().filter_map(|line| line.strip_prefix("<!-- row ")?.strip_suffix(" -->")).collect();
        let (_, machine) = existing.split_once("## The machine\n").expect("the machine");
        let (machine, _) = machine.split_once("<!-- row ").expect("a row");
        assert!(
            page(&existing, &rows, &[], machine) == existing,
            "{PAGE} differs from frame.md; change its prose in frame.md"
        );
    }

    #[test]
    fn targets_are_reached_or_missed_by_the_measured_value() {
        let reached = |measured| Target::at_least("", Some(measured), "", 1.5, Some(2.0)).verdict();
        assert_eq!([reached(1.4), reached(1.5), reached(2.0)], ["**no**", "yes", "goal"]);
        let reached = |measured| Target::at_most("", Some(measured), "", 0.75, Some(0.65)).verdict();
        assert_eq!([reached(0.8), reached(0.7), reached(0.6)], ["**no**", "yes", "goal"]);
        assert_eq!(Target::at_most("", None, "", 1.0, None).verdict(), "not measured");
    }
}
