//! A picture of where the time of a boot went: a bar for each phase, one below the other, each
//! beginning where the last ended.

use std::fmt::Write;

use crate::report::{Report, ShapeReport};

const WIDTH: f64 = 900.0;
const LABELS_WIDTH: f64 = 130.0;
const FIGURES_WIDTH: f64 = 110.0;
const ROW_HEIGHT: f64 = 22.0;

/// All shapes of a report, as SVG.
pub(crate) fn svg(report: &Report) -> String {
    let rows: usize = report.shapes.iter().map(|shape| shape.phases.len() + 2).sum();
    let height = rows as f64 * ROW_HEIGHT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" \
         fill=\"white\"/>\n"
    );
    let mut top = 0.0;
    for shape in &report.shapes {
        top = draw(&mut svg, shape, report.unit(), top);
    }
    svg.push_str("</svg>\n");
    svg
}

/// Draws one below `top`; returns where the next belongs.
fn draw(svg: &mut String, shape: &ShapeReport, unit: &str, top: f64) -> f64 {
    let total: f64 = shape.phases.iter().map(|(_, took)| took).sum();
    let scale = (WIDTH - LABELS_WIDTH - FIGURES_WIDTH) / total;
    let (vcpus, memory_mib) = (shape.vcpus, shape.memory_mib);
    let mut y = top + ROW_HEIGHT;
    let title = format!("{vcpus} vCPU, {memory_mib} MiB: {total:.1} {unit} to the first output");
    text(svg, 8.0, y - 6.0, &title);
    let mut x = LABELS_WIDTH;
    for (name, took) in &shape.phases {
        let width = took * scale;
        text(svg, 8.0, y + ROW_HEIGHT - 7.0, name);
        let height = ROW_HEIGHT - 6.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height}\" \
             fill=\"#3b6ea5\"/>",
            y + 3.0
        );
        text(svg, x + width + 6.0, y + ROW_HEIGHT - 7.0, &format!("{took:.1}"));
        x += width;
        y += ROW_HEIGHT;
    }
    y + ROW_HEIGHT
}

fn text(svg: &mut String, x: f64, y: f64, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
}
