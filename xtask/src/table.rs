//! Markdown tables that are also readable on a terminal.

/// Returns a Markdown table. Columns after the first are right-aligned.
pub fn markdown(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |(column, name): (usize, &&str)| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([name.chars().count()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = header.iter().enumerate().map(width).collect();
    let line = |row: Vec<&str>| {
        let cell = |(column, width): (usize, &usize)| {
            let text = row.get(column).copied().unwrap_or_default();
            if column == 0 { format!(" {text:<width$} |") } else { format!(" {text:>width$} |") }
        };
        format!("|{}\n", widths.iter().enumerate().map(cell).collect::<String>())
    };
    let separator = |(column, width): (usize, &usize)| {
        let end = if column == 0 { "-" } else { ":" };
        format!("{}{end}|", "-".repeat(width + 1))
    };
    let mut table = line(header.to_vec());
    table.push_str(&format!("|{}\n", widths.iter().enumerate().map(separator).collect::<String>()));
    rows.iter().for_each(|row| table.push_str(&line(row.iter().map(String::as_str).collect())));
    table
}

/// Formats seconds: three decimals below one second, one above.
pub fn seconds(seconds: f64) -> String {
    let decimals = if seconds < 1.0 { 3 } else { 1 };
    format!("{seconds:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let table = markdown(&["a", "seconds"], &[vec!["wide".into(), "1.0".into()]]);
        assert_eq!(table, "| a    | seconds |\n|------|--------:|\n| wide |     1.0 |\n");
    }
}
