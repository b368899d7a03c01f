//! `liveblk image check`: is the image's metadata consistent? Nothing is repaired.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::check::{CheckResult, check};
use crate::runtime::Handle;

use super::super::Outcome;
use super::super::args::Output;
use super::super::format::Format;
use super::super::image_args::CheckArguments;
use super::opened::{Access, Opened, text_of};

/// Exit statuses beyond the usual ones, as qemu-img's.
const CORRUPTIONS: u8 = 2;
const LEAKS: u8 = 3;

pub(super) async fn run(handle: &Handle, arguments: &CheckArguments) -> Result<Outcome> {
    if arguments.image.format()? != Format::Qcow2 {
        let text = "This image format does not support checks";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let access = Access::to_read(arguments.force_share);
    let image = Opened::open(handle, &arguments.image.file, access).await?;
    let result = check(image.edge()).await?;
    image.close().await?;
    for finding in &result.findings {
        eprintln!("liveblk: {}", finding.message);
    }
    let text = match arguments.output {
        Output::Human => text(&result),
        Output::Json => format!("{:#}\n", json(&result, text_of(&arguments.image.file)?)),
    };
    let status = status(&result);
    Ok(Outcome { text, status })
}

fn status(result: &CheckResult) -> u8 {
    match result {
        result if result.corruptions > 0 => CORRUPTIONS,
        result if result.check_errors > 0 => 1,
        result if result.leaks > 0 => LEAKS,
        _ => 0,
    }
}

/// `ImageCheck`: counts that are zero are left out where qemu-img leaves them out.
fn json(result: &CheckResult, filename: &str) -> Value {
    let mut value = json!({
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "check-errors": result.check_errors,
        "filename": filename,
        "format": "qcow2",
    });
    for (name, count) in [
        ("corruptions", result.corruptions),
        ("leaks", result.leaks),
        ("allocated-clusters", result.allocated_clusters),
        ("fragmented-clusters", result.fragmented_clusters),
        ("compressed-clusters", result.compressed_clusters),
    ] {
        if count > 0 {
            value[name] = count.into();
        }
    }
    value
}

fn text(result: &CheckResult) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(result, &mut text);
    text
}

fn write(result: &CheckResult, out: &mut String) -> std::fmt::Result {
    if result.is_clean() {
        writeln!(out, "No errors were found on the image.")?;
    }
    if result.corruptions > 0 {
        writeln!(
            out,
            "\n{} errors were found on the image.",
            result.corruptions
        )?;
        let harm = "Data may be corrupted, or further writes to the image may corrupt it.";
        writeln!(out, "{harm}")?;
    }
    if result.leaks > 0 {
        writeln!(
            out,
            "\n{} leaked clusters were found on the image.",
            result.leaks
        )?;
        writeln!(out, "This means waste of disk space, but no harm to data.")?;
    }
    if result.check_errors > 0 {
        let errors = result.check_errors;
        writeln!(
            out,
            "\n{errors} internal errors have occurred during the check."
        )?;
    }
    if result.total_clusters > 0 && result.allocated_clusters > 0 {
        let percent = |count: u64, of: u64| count as f64 * 100.0 / of as f64;
        let (allocated, total) = (result.allocated_clusters, result.total_clusters);
        writeln!(
            out,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(result.fragmented_clusters, allocated),
            percent(result.compressed_clusters, allocated),
        )?;
    }
    writeln!(out, "Image end offset: {}", result.image_end_offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(check_errors: u64, corruptions: u64, leaks: u64) -> CheckResult {
        CheckResult {
            check_errors,
            corruptions,
            leaks,
            image_end_offset: 65536,
            total_clusters: 4,
            allocated_clusters: 3,
            ..CheckResult::default()
        }
    }

    #[test]
    fn the_status_tells_the_worst() {
        assert_eq!(status(&result(0, 0, 0)), 0);
        assert_eq!(status(&result(1, 0, 9)), 1);
        assert_eq!(status(&result(1, 1, 1)), CORRUPTIONS);
        assert_eq!(status(&result(0, 0, 1)), LEAKS);
    }

    #[test]
    fn findings_are_counted_in_words() {
        let text = text(&result(0, 2, 1));
        assert!(
            text.starts_with("\n2 errors were found on the image.\n"),
            "{text}"
        );
        assert!(text.contains("\n1 leaked clusters were found"), "{text}");
        assert!(
            text.contains("\n3/4 = 75.00% allocated, 0.00% fragmented"),
            "{text}"
        );
        assert!(text.ends_with("Image end offset: 65536\n"), "{text}");
    }
}
