//! Plots as SVG text, in one look: thin lines, a light grid, the legend inside.

use std::error::Error;
use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::{Axes, Plot};
use crate::stats::{grouped, micros};

const SIZE: (u32, u32) = (860, 320);
const COLOURS: [RGBColor; 6] = [
    RGBColor(13, 110, 143),
    RGBColor(214, 102, 36),
    RGBColor(92, 141, 60),
    RGBColor(140, 86, 160),
    RGBColor(176, 58, 72),
    RGBColor(110, 110, 110),
];
const GRID: RGBColor = RGBColor(225, 229, 232);
const TEXT: RGBColor = RGBColor(70, 78, 84);

/// Draws a plot; `None` where there is nothing to draw.
pub(super) fn draw(plot: &Plot) -> Result<Option<String>> {
    let points = || {
        plot.lines
            .iter()
            .flat_map(|line| line.points.iter().copied())
    };
    let Some(x_max) = points().map(|p| p.0).reduce(f64::max) else {
        return Ok(None);
    };
    let x_min = points().map(|p| p.0).fold(x_max, f64::min);
    let x = if plot.axes == Axes::Percentiles {
        0.0..x_max
    } else {
        x_min..x_max
    };
    if x.is_empty() {
        return Ok(None);
    }
    let highest = points().map(|p| p.1).fold(0.0, f64::max);
    let mut svg = String::new();
    let drawn = match plot.axes {
        Axes::Time => {
            let top = if highest > 0.0 { highest * 1.12 } else { 1.0 };
            onto(&mut svg, plot, x, 0.0..top, &|y| number(*y))
        }
        Axes::TimeLatency | Axes::Percentiles => {
            let lowest = points()
                .map(|p| p.1)
                .filter(|y| *y > 0.0)
                .fold(highest, f64::min)
                .max(1.0);
            // From a power of ten over a whole decade at least: only powers of ten get a label.
            let bottom = decade_below(lowest);
            let top = (highest * 1.3).max(bottom * 10.5);
            onto(&mut svg, plot, x, (bottom..top).log_scale(), &|y| {
                micros(y.round() as u64).replace(".00", "")
            })
        }
    };
    drawn.map_err(|e| anyhow!("cannot draw {:?}: {e}", plot.title))?;
    Ok(Some(svg))
}

fn onto<Y>(
    svg: &mut String,
    plot: &Plot,
    x: Range<f64>,
    y: Y,
    y_label: &dyn Fn(&f64) -> String,
) -> Result<(), Box<dyn Error>>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let percentiles = plot.axes == Axes::Percentiles;
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .margin_right(26)
        .x_label_area_size(40)
        .y_label_area_size(76)
        .build_cartesian_2d::<RangedCoordf64, Y>(x.clone().into(), y)?;
    let x_label = |x: &f64| if percentiles { nines(*x) } else { number(*x) };
    let font = ("sans-serif", 13).into_font().color(&TEXT);
    chart
        .configure_mesh()
        .x_labels(if percentiles {
            (x.end.floor() as usize) + 1
        } else {
            10
        })
        .y_labels(6)
        .x_desc(if percentiles { "percentile" } else { "seconds" })
        .y_desc(plot.unit.as_str())
        .x_label_formatter(&x_label)
        .y_label_formatter(y_label)
        .label_style(font.clone())
        .axis_desc_style(font.clone())
        .axis_style(GRID)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (line, colour) in plot.lines.iter().zip(COLOURS.iter().cycle()) {
        chart
            .draw_series(LineSeries::new(
                line.points.iter().copied(),
                colour.stroke_width(2),
            ))?
            .label(line.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    if plot.lines.len() > 1 {
        // Where lines seldom are: latencies rise to the right, figures over time stay high.
        let corner = match plot.axes {
            Axes::Percentiles => SeriesLabelPosition::UpperLeft,
            Axes::TimeLatency => SeriesLabelPosition::UpperRight,
            Axes::Time => SeriesLabelPosition::LowerRight,
        };
        chart
            .configure_series_labels()
            .position(corner)
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .label_font(font)
            .draw()?;
    }
    drop(chart);
    root.present()?;
    Ok(())
}

/// 0 → 0 %, 1 → 90 %, 2 → 99 %, 3 → 99.9 %.
fn nines(x: f64) -> String {
    let decimals = (x.round() as usize).saturating_sub(2);
    format!("{:.decimals$} %", 100.0 * (1.0 - 10f64.powf(-x)))
}

/// The power of ten at or below `value`.
fn decade_below(value: f64) -> f64 {
    10f64.powf(value.log10().floor())
}

fn number(x: f64) -> String {
    match x.abs() {
        v if v >= 1_000.0 => grouped(v.round() as u64),
        v if v >= 10.0 || v == v.round() => format!("{x:.0}"),
        v if v < 1.0 => format!("{x:.2}"),
        _ => format!("{x:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Line;

    #[test]
    fn axis_labels_are_what_people_expect() {
        assert_eq!(
            ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"],
            [0.0, 1.0, 2.0, 3.0, 4.0].map(nines).as_slice()
        );
        assert_eq!(number(12_345.0), "12,345");
        assert_eq!(number(0.5), "0.50");
        assert_eq!(number(0.25), "0.25");
        assert!((decade_below(250.0) - 100.0).abs() < 1e-6);
        assert_eq!(number(2.5), "2.5");
    }

    #[test]
    fn lines_are_drawn_and_named() {
        let lines = vec![
            Line::new("one", vec![(0.0, 100.0), (3.0, 9_000.0)]),
            Line::new("other", vec![(0.0, 50.0), (3.0, 700.0)]),
        ];
        for axes in [Axes::Time, Axes::TimeLatency, Axes::Percentiles] {
            let plot = Plot {
                title: "t".into(),
                unit: "u".into(),
                axes,
                lines: lines.clone(),
            };
            let svg = draw(&plot).unwrap().expect("there are points");
            assert!(
                svg.contains("one")
                    && svg.contains("other")
                    && svg.matches("<polyline").count() >= 2
            );
        }
    }

    #[test]
    fn nothing_to_draw_is_not_drawn() {
        for points in [vec![], vec![(1.0, 1.0)]] {
            let plot = Plot::over_time("t", "u", vec![Line::new("one", points)]);
            assert_eq!(draw(&plot).unwrap(), None);
        }
    }
}
