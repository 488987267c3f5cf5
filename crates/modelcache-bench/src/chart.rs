//! Line charts on two logarithmic axes, as SVG files beside the page. On these axes, a cost that is proportional to the
//! horizontal value is a straight line of slope one.

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use std::fs;
use std::path::Path;

/// Width and height of a chart, in pixels.
const SIZE: (u32, u32) = (640, 360);
/// Colours of the lines. They are readable on white and on dark backgrounds, and distinguishable for readers with
/// red-green colour blindness.
const COLOURS: [RGBColor; 3] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115)];
/// Free space around the lines, as a factor.
const MARGIN: f64 = 1.5;

/// A chart of one section.
pub(super) struct Chart {
    /// Name of the file, without its extension.
    pub(super) name: &'static str,
    /// What the chart shows. It is the caption, and the text for readers who cannot see the chart.
    pub(super) title: String,
    /// Name and unit of the horizontal axis.
    pub(super) x: &'static str,
    /// Name and unit of the vertical axis.
    pub(super) y: &'static str,
    pub(super) lines: Vec<ChartLine>,
}

/// One line of a chart.
pub(super) struct ChartLine {
    pub(super) name: String,
    /// Positive coordinates.
    pub(super) points: Vec<(f64, f64)>,
}

impl Chart {
    /// Returns the chart as an image in Markdown.
    pub(super) fn markdown(&self) -> String {
        format!("![{}]({}.svg)\n", self.title, self.name)
    }

    /// Writes the chart into `folder`.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(self.name).with_extension("svg");
        fs::write(&path, self.svg()?).with_context(|| format!("cannot write {}", path.display()))
    }

    fn svg(&self) -> Result<String> {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        ensure!(
            points().next().is_some() && points().all(|(x, y)| *x > 0.0 && *y > 0.0),
            "a chart on logarithmic axes needs positive values"
        );
        let range = |value: fn(&(f64, f64)) -> f64| {
            let (least, most) = points()
                .map(value)
                .fold((f64::INFINITY, 0.0_f64), |(least, most), value| (least.min(value), most.max(value)));
            // Extend the axis to whole decades. The first tick is at a power of ten, so an axis that contains no power
            // of ten would have no labels.
            let power = |exponent: f64| 10_f64.powf(exponent);
            (power(least.log10().floor()) / MARGIN..power(most.log10().ceil()) * MARGIN).log_scale()
        };
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            area.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&area)
                .caption(&self.title, ("sans-serif", 15))
                .margin(10)
                .x_label_area_size(40)
                .y_label_area_size(60)
                .build_cartesian_2d(range(|(x, _)| *x), range(|(_, y)| *y))?;
            // Ticks are products, such as 3 * 0.1, so they are rounded.
            let label = |value: &f64| format!("{}", (value * 1e6).round() / 1e6);
            let mut mesh = chart.configure_mesh();
            mesh.x_desc(self.x).y_desc(self.y).x_label_formatter(&label).y_label_formatter(&label).draw()?;
            for (line, colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
                let points = line.points.iter().copied();
                chart
                    .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?
                    .label(&line.name)
                    .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
                chart.draw_series(points.map(|point| Circle::new(point, 3, colour.filled())))?;
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperLeft)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .draw()?;
            area.present()?;
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        let lines = vec![ChartLine { name: "get <first>".into(), points }];
        Chart { name: "growth", title: "Time by files".into(), x: "files", y: "seconds", lines }
    }

    #[test]
    fn a_chart_is_svg_with_its_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let chart = chart(vec![(1.0, 0.01), (10_000.0, 3.0)]);
        chart.write(folder.path()).expect("written");
        let text = fs::read_to_string(folder.path().join("growth.svg")).expect("the file");
        for part in ["<svg", "Time by files", "seconds", "get &lt;first&gt;", "<polyline", "</svg>"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(chart.markdown(), "![Time by files](growth.svg)\n");
    }

    #[test]
    fn the_axes_of_close_values_have_labels() {
        let text = chart(vec![(1.0, 0.2), (256.0, 0.45)]).svg().expect("drawn");
        let labels: Vec<&str> = text.lines().map(str::trim).filter(|line| line.parse::<f64>().is_ok()).collect();
        assert!(["0.1", "1", "100"].iter().all(|label| labels.contains(label)), "{labels:?}");
        assert!(labels.iter().all(|label| label.len() < 6), "rounded: {labels:?}");
    }

    #[test]
    fn values_that_have_no_place_on_the_axes_are_refused() {
        for points in [vec![], vec![(1.0, 0.0)]] {
            chart(points).svg().expect_err("refused");
        }
    }
}
