//! What a body costs to read, as the kernel sees it, with the allocator that the services have.
//! Each body is read by a process of its own, which has freed nothing before that could be used
//! again without being seen.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{fs, process::Command};

use platform::json;
use prost::Name as _;
use prost_reflect::DescriptorPool;
use proto::loms::CreateOrderRequest;

const MIB: usize = 1024 * 1024;
/// The kernel counts pages by CPU and adds them up now and then.
const SLACK: usize = 256 * 1024;

/// A line of `/proc/self/status` in bytes.
fn status(key: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<usize>().unwrap() * 1024
}

/// The file that a child reads its body from.
const BODY: &str = "JSON_MEMORY_BODY";

/// The child: how far memory rises while its body is read, and how many lines that has.
fn measure(file: &str) {
    let contract = DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
    let name = CreateOrderRequest::full_name();
    let shape = contract.get_message_by_name(&name).unwrap();
    let read = |body: &[u8]| json::read::<CreateOrderRequest>(&shape, body);
    // the program's own pages are not the body's
    let _ = read(br#"{"user":1,"items":[{"sku":"1","x":[{}]},{}],"idempotencyKey":"\n"}"#);
    let _ = read(br#"{"user":1e99,"User":1,"items":[1,{"sku":[]}],"items":1}"#);
    let body = fs::read(file).unwrap();
    // "reset the peak resident set size" (proc_pid_clear_refs(5))
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    let read = read(&body);
    let peak = status("VmHWM:").saturating_sub(before);
    println!(
        "peak {peak} lines {:?}",
        read.ok().map(|order| order.items.len())
    );
}

/// What a child says of `body`.
fn peak(body: &str) -> (usize, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), body).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    // a page of 2 MiB would hide what is smaller
    child.arg("--nocapture").env("MIMALLOC_ALLOW_THP", "0");
    child.env(BODY, file.path());
    let said = String::from_utf8(child.output().unwrap().stdout).unwrap();
    let (_, said) = said.split_once("peak ").expect(&said);
    let (peak, lines) = said.lines().next().unwrap().split_once(" lines ").unwrap();
    (peak.parse().unwrap(), lines.to_owned())
}

fn order(line: &str, lines: usize) -> String {
    format!(r#"{{"user":1,"items":[{}]}}"#, vec![line; lines].join(","))
}

#[test]
fn a_body_costs_a_few_times_its_bytes() {
    if let Ok(file) = std::env::var(BODY) {
        return measure(&file);
    }
    let note = "é".repeat(32);
    let long_lines = order(
        &format!(r#"{{"sku":4294967295,"count":65535,"x":"{note}"}}"#),
        10_000,
    );
    assert!(
        (MIB - 60_000..MIB).contains(&long_lines.len()),
        "{}",
        long_lines.len()
    );
    let key = format!(r#"{{"idempotencyKey":"{}"}}"#, "\\n".repeat(MIB / 2 - 100));
    let legal = [
        ("10,000 long lines", long_lines, 10_000),
        (
            "10,000 short lines",
            order(r#"{"sku":1,"count":1}"#, 10_000),
            10_000,
        ),
        ("one long string", key, 0),
    ];
    for (what, body, lines) in legal {
        let (peak, lines_read) = peak(&body);
        println!("{what}: {} bytes, peak {peak}", body.len());
        assert_eq!(lines_read, format!("Some({lines})"), "{what}");
        assert!(
            peak <= 10 * body.len() + SLACK,
            "{what}: {peak} of {}",
            body.len()
        );
    }

    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let nasty = [
        (
            "nested 100 deep",
            format!(r#"{{"x":[{}]}}"#, vec![deep; 20_000].join(",")),
        ),
        ("empty lines", order("{}", 4 * MIB / 3)),
        (
            "wrong lines",
            order(r#"{"sku":[],"Sku":"","count":1.5,"count":1}"#, 100_000),
        ),
        (
            "a field again and again",
            format!("{{{}\"x\":1}}", r#""user":1,"#.repeat(4 * MIB / 9)),
        ),
        ("brackets", "[".repeat(4 * MIB)),
        ("digits", format!(r#"{{"user":{}}}"#, "9".repeat(4 * MIB))),
    ];
    for (what, body) in nasty {
        assert!(body.len() > 3 * MIB, "{what}");
        let (peak, lines_read) = peak(&body);
        println!("{what}: {} bytes, peak {peak}", body.len());
        assert_eq!(lines_read, "None", "{what}");
        assert!(peak < 4 * MIB, "{what}: {peak}");
    }
}
