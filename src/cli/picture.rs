//! A chain drawn in text, one line per layer, however deep it is.

use serde_json::Value;

use super::chain::{Chain, Export, Layer, PlacedJob, text_of};
use super::size::human;

/// The picture of all chains; says so if there is none.
pub(super) fn draw(chains: &[Chain]) -> String {
    if chains.is_empty() {
        return "no nodes\n".to_string();
    }
    let pictures: Vec<String> = chains.iter().map(one).collect();
    pictures.join("\n")
}

fn one(chain: &Chain) -> String {
    let mut text = String::new();
    for export in &chain.exports {
        text += &format!("{}\n", export_line(export));
    }
    let rows: Vec<[String; 5]> = chain.layers.iter().map(cells).collect();
    let widths: [usize; 5] = std::array::from_fn(|column| {
        let width = |row: &[String; 5]| row[column].chars().count();
        rows.iter().map(width).max().unwrap_or(0)
    });
    for (index, row) in rows.iter().enumerate() {
        let here = |placed: &&PlacedJob| placed.layers_above == index;
        for placed in chain.jobs.iter().filter(here) {
            let joint = match (index, chain.exports.is_empty()) {
                (0, true) => " ",
                _ => "│",
            };
            text += &format!("{joint}  {}\n", job_line(placed));
        }
        let last = index + 1 == rows.len();
        let joint = match (last, index) {
            (true, 0) => "──",
            (true, _) => "└─",
            (false, 0) if chain.exports.is_empty() => "┌─",
            (false, _) => "├─",
        };
        let mut line = joint.to_string();
        for (cell, width) in row.iter().zip(widths) {
            line += &format!(" {cell:<width$} ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn cells(layer: &Layer) -> [String; 5] {
    let access = match layer.read_only {
        true => "read-only",
        false => "writable",
    };
    let occupied = match layer.actual_size {
        Some(bytes) => format!("{}, {} on disk", human(layer.virtual_size), human(bytes)),
        None => human(layer.virtual_size),
    };
    [
        layer.node_name.clone(),
        layer.driver.clone(),
        access.to_string(),
        occupied,
        layer.file.clone(),
    ]
}

/// `↓ commit ID into NODE, STATUS, PERCENT`: where the data goes (up, down or aside), and how far it is.
fn job_line(placed: &PlacedJob) -> String {
    let job = &placed.job;
    let arrow = match &*job.kind {
        "stream" => "↑",
        "mirror" => "→",
        _ => "↓",
    };
    let target = match &placed.target {
        Some(target) => format!(" into {target}"),
        None => String::new(),
    };
    let (kind, id, status) = (&job.kind, &job.id, &job.status);
    format!("{arrow} {kind} {id}{target}, {status}, {} %", job.percent())
}

/// `DEVICE (export ID, TYPE)`, or without a device `export ID (TYPE)`.
fn export_line(export: &Export) -> String {
    let (id, kind) = (text_of(export, "id"), text_of(export, "type"));
    let zero_copy = match export.get("zero-copy").and_then(Value::as_bool) {
        Some(true) => ", zero copy",
        _ => "",
    };
    match text_of(export, "device") {
        "" => format!("export {id} ({kind})"),
        device => format!("{device} (export {id}, {kind}{zero_copy})"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::chain::tests::{committing, exported, three_layers};
    use super::*;

    #[test]
    fn each_layer_is_a_line_under_its_device() {
        let chains = three_layers(exported()).chains(&[]).unwrap();
        let wanted = "\
/dev/ublkb0 (export exp0, ublk, zero copy)
├─ node-C  qcow2  writable   8 MiB, 196 KiB on disk  c.qcow2
├─ node-B  qcow2  writable   8 MiB, 196 KiB on disk  b.qcow2
└─ node-A  raw    read-only  8 MiB, 196 KiB on disk  ./a.raw
";
        assert_eq!(draw(&chains), wanted);
    }

    #[test]
    fn what_is_not_exported_has_no_line_above() {
        let state = three_layers(json!([]));
        let names = ["node-B".to_string(), "node-A".to_string()];
        let wanted = "\
┌─ node-B  qcow2  writable   8 MiB, 196 KiB on disk  b.qcow2
└─ node-A  raw    read-only  8 MiB, 196 KiB on disk  ./a.raw

── node-A  raw  read-only  8 MiB, 196 KiB on disk  ./a.raw
";
        assert_eq!(draw(&state.chains(&names).unwrap()), wanted);
    }

    #[test]
    fn a_job_is_a_line_above_what_it_works_on() {
        let wanted = "\
/dev/ublkb0 (export exp0, ublk, zero copy)
├─ node-C  qcow2  writable   8 MiB, 196 KiB on disk  c.qcow2
│  ↓ commit commit0 into node-A, running, 42 %
├─ node-B  qcow2  writable   8 MiB, 196 KiB on disk  b.qcow2
└─ node-A  raw    read-only  8 MiB, 196 KiB on disk  ./a.raw
";
        assert_eq!(draw(&committing().chains(&[]).unwrap()), wanted);
    }

    #[test]
    fn nothing_is_said_to_be_nothing() {
        assert_eq!(draw(&[]), "no nodes\n");
    }
}
