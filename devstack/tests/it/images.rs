//! The images without an engine: what `.dockerignore` lets into the build is a whole workspace and no secret, what the
//! Dockerfile copies is there, and the health check tells life from death.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    process::Command,
};

use crate::deployments::{read, root, variables};

/// Whether `.dockerignore` lets a path in: the last pattern that fits it, or a folder above it, decides.
fn let_in(path: &Path, patterns: &[String]) -> bool {
    let mut inside = true;
    for pattern in patterns {
        let (negated, pattern) = pattern
            .strip_prefix('!')
            .map_or((false, pattern.as_str()), |rest| (true, rest));
        let parts: Vec<_> = pattern.split('/').collect();
        let fits = |path: &Path| {
            let names: Vec<_> = path.iter().collect();
            names.len() == parts.len()
                && parts
                    .iter()
                    .zip(names)
                    .all(|(part, name)| *part == "*" || *part == name)
        };
        if path.ancestors().any(fits) {
            inside = negated;
        }
    }
    inside
}

fn patterns() -> Vec<String> {
    let text = read(".dockerignore");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(str::to_owned).collect()
}

/// Every file of the build, relative to the repository.
fn context() -> BTreeSet<PathBuf> {
    let (patterns, root) = (patterns(), root());
    let mut found = BTreeSet::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                // nothing below these is let in again, and they are large
                if !["target", ".git"].iter().any(|name| path.starts_with(name)) {
                    folders.push(path);
                }
            } else if let_in(&path, &patterns) {
                found.insert(path);
            }
        }
    }
    found
}

#[test]
fn no_secret_gets_into_a_build() {
    let patterns = patterns();
    for path in [
        "certs/loms-key.pem",
        "deployments/.env",
        "checkout/config.yaml",
        ".git/config",
        "target/debug/loms",
        "notes.txt",
    ] {
        assert!(!let_in(Path::new(path), &patterns), "{path}");
    }
}

#[tokio::test]
async fn what_gets_into_a_build_is_the_workspace() {
    let dir = tempfile::tempdir().unwrap();
    for path in context() {
        let copy = dir.path().join(&path);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(root().join(&path), copy).unwrap();
    }
    let rustc = Command::new("rustc").arg("-vV").output().await.unwrap();
    let rustc = String::from_utf8(rustc.stdout).unwrap();
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: "));
    // resolves every member, target and dependency from what was let in; to compile it takes minutes. Of this platform:
    // what only others need is nowhere on a machine that has built this and nothing else
    let output = Command::new("cargo")
        .args(["metadata", "--locked", "--offline", "--format-version=1"])
        .args(["--filter-platform", host.unwrap()])
        .current_dir(dir.path())
        .output()
        .await
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let members = metadata["workspace_members"].as_array().unwrap().len();
    let programs = metadata["packages"].as_array().unwrap().iter();
    let programs = programs
        .filter(|package| package["source"].is_null())
        .flat_map(|package| package["targets"].as_array().unwrap())
        .filter(|target| target["kind"][0] == "bin");
    assert_eq!((members, programs.count()), (7, 4));
    // what the compiler reads besides sources
    for path in [
        ".cargo/config.toml",
        "loms/.sqlx",
        "loms/sqlx.toml",
        "migrations/loms",
        "proto/api/loms.proto",
        "devstack/data/retail/products.csv",
    ] {
        assert!(dir.path().join(path).exists(), "{path}");
    }
}

/// The Dockerfile's instructions, continued lines joined.
fn instructions() -> Vec<String> {
    let text = read("deployments/Dockerfile").replace("\\\n", " ");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter(|line| !line.is_empty())
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn the_dockerfile_copies_what_is_there() {
    let (mut stages, context) = (Vec::new(), context());
    let mut built = BTreeSet::new();
    for instruction in instructions() {
        let words: Vec<_> = instruction.split(' ').collect();
        match words.as_slice() {
            ["FROM", image, "AS", stage] => {
                let (_, tag) = image.split_once(':').expect("a tag");
                assert!(tag.split('.').count() >= 2, "{image} names no version");
                stages.push((*stage).to_owned());
            }
            ["COPY", from @ .., source, _] => match from
                .iter()
                .find_map(|option| option.strip_prefix("--from="))
            {
                Some(stage) => {
                    assert!(stages.iter().any(|known| known == stage), "{stage}");
                    let program = source.strip_prefix("/out/");
                    assert!(
                        program == Some("${SERVICE}")
                            || *source == "/etc/ssl/certs/ca-certificates.crt",
                        "{source}"
                    );
                }
                None => assert!(
                    *source == "." || context.contains(Path::new(source)),
                    "{source}"
                ),
            },
            ["RUN", words @ ..] => built.extend(
                words
                    .iter()
                    .filter_map(|word| word.strip_prefix("target/release/"))
                    .map(str::to_owned),
            ),
            _ => {}
        }
    }
    let programs = ["checkout", "loms", "notifications", "devstack"];
    assert_eq!(built, programs.map(str::to_owned).into());
    assert!(instructions().contains(&"USER 10001:10001".to_owned()));
    let checks = instructions();
    let checks = checks.iter().filter(|line| line.starts_with("HEALTHCHECK"));
    assert_eq!(checks.count(), 1);
}

/// Answers one request with `status`, and says what was asked.
async fn answer_once(listener: TcpListener, status: &str) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        asked.push(stream.read_u8().await.unwrap());
    }
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(answer.as_bytes()).await.unwrap();
    String::from_utf8(asked).unwrap()
}

async fn is_healthy(port: u16) -> bool {
    let mut check = Command::new("bash");
    check.arg(root().join("deployments/healthy"));
    let output = check.env("HEALTH_PORT", port.to_string()).output().await;
    output.unwrap().status.success()
}

#[tokio::test]
async fn the_health_check_tells_life_from_death() {
    for (status, expected) in [
        ("200 OK", true),
        ("503 Service Unavailable", false),
        ("500 Internal Server Error", false),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (asked, healthy) = tokio::join!(answer_once(listener, status), is_healthy(port));
        assert!(asked.starts_with("GET /healthz HTTP/1.0\r\n"), "{asked}");
        assert_eq!(healthy, expected, "{status}");
        assert!(!is_healthy(port).await, "nobody listens any more");
    }
}

#[tokio::test]
async fn a_new_env_has_passwords_of_its_own() {
    let script = root().join("deployments/new-env");
    let print = async || {
        let output = Command::new(&script).output().await.unwrap();
        assert!(output.status.success());
        variables(&String::from_utf8(output.stdout).unwrap())
    };
    let example = variables(&read("deployments/example.env"));
    let (first, second) = (print().await, print().await);
    assert!(first.keys().eq(example.keys()));
    for (name, value) in &first {
        let secret = name.contains("PASSWORD");
        assert_eq!(secret, *value != second[name], "{name}={value}");
        assert_eq!(secret, *value != example[name], "{name}={value}");
    }
    for env in [first, second, example] {
        use sha2::Digest as _;
        let hash = sha2::Sha256::digest(&env["GRAYLOG_ROOT_PASSWORD"]);
        let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(env["GRAYLOG_ROOT_PASSWORD_SHA2"], hash);
        assert!(env["GRAYLOG_PASSWORD_SECRET"].len() >= 16);
    }
}
