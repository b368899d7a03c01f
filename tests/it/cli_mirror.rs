//! `liveblk mirror` against QEMU's daemon and ours.

use std::path::Path;

use crate::cli::{daemon, failure, qemu, result, waited};
use crate::cli_jobs::{assert_content, layers, quit, with_both};

fn at(place: &Path, file: &str) -> String {
    place.join(file).to_str().expect("UTF-8").to_string()
}

#[test]
fn a_mirror_takes_the_place_of_its_chain() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let (done, progress) = waited(place, &["mirror", "copy.qcow2"]);
        assert_eq!(done, "mirror0: completed\n");
        assert!(progress.contains("mirror0: ready, 100 %"), "{progress}");
        assert_eq!(layers(place), [at(place, "copy.qcow2")]);
        let error = failure(place, 1, &["mirror", "copy.qcow2"]);
        assert!(error.contains("copy.qcow2' exists"), "{error}");
        let error = failure(place, 1, &["mirror", "copy.img"]);
        assert!(error.contains("--format"), "{error}");
        quit(place, daemon);
        assert_content(place, "copy.qcow2");
    });
}

#[test]
fn a_mirror_without_pivot_is_a_copy() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let words = [
            "mirror",
            "--no-pivot",
            "--copy-mode",
            "write-blocking",
            "copy.raw",
            "e0",
        ];
        let (done, _) = waited(place, &words);
        assert_eq!(done, "mirror0: completed\n");
        assert_eq!(layers(place), ["top.qcow2", "mid.qcow2", "base.qcow2"]);
        assert_eq!(result(place, &["jobs"]), "no jobs\n");
        quit(place, daemon);
        let compare = [
            "compare",
            "-q",
            "-f",
            "raw",
            "-F",
            "qcow2",
            "copy.raw",
            "top.qcow2",
        ];
        qemu(place, "qemu-img", &compare);
    });
}

#[test]
fn a_mirror_of_the_active_layer_keeps_the_rest_of_the_chain() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let words = [
            "mirror",
            "--sync",
            "top",
            "--no-complete",
            "--job-id",
            "m",
            "copy.qcow2",
        ];
        let (ready, _) = waited(place, &words);
        assert!(
            ready.starts_with("m: ready; 'liveblk job complete m'"),
            "{ready}"
        );
        assert!(ready.contains("the copy as active layer"), "{ready}");
        let picture = result(place, &["chain"]);
        assert!(picture.contains("→ mirror m into copy, ready"), "{picture}");
        waited(place, &["job", "complete", "m", "--wait"]);
        let copy = at(place, "copy.qcow2");
        assert_eq!(layers(place), [&*copy, "mid.qcow2", "base.qcow2"]);
        quit(place, daemon);
        assert_content(place, "copy.qcow2");
    });
}
