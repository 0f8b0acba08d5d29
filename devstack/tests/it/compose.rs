//! The compose files hold together: whatever one of them names exists, and what runs is pinned, bounded and nobody's root.
//! A Docker engine would find most of these mistakes by not starting; this finds them without one.

use std::collections::{BTreeMap, BTreeSet};

use crate::deployments::{Compose, Service, entries, read, root, variables};

/// Outside, inside, protocol.
type Port = (u16, u16, &'static str);

/// The contract's ports, and the stand-in's, by who has them.
const PORTS: [(&str, &[Port]); 6] = [
    (
        "gateway",
        &[
            (50051, 50051, "tcp"),
            (8090, 8090, "tcp"),
            (50052, 50052, "tcp"),
            (8081, 8081, "tcp"),
            (50053, 50053, "tcp"),
            (8082, 8082, "tcp"),
        ],
    ),
    ("products", &[(50054, 50054, "tcp")]),
    (
        "graylog",
        &[
            (7555, 9000, "tcp"),
            (12201, 12201, "tcp"),
            (12202, 12202, "tcp"),
            (12203, 12203, "tcp"),
        ],
    ),
    ("jaeger", &[(16686, 16686, "tcp"), (6831, 6831, "udp")]),
    ("prometheus", &[(9090, 9090, "tcp")]),
    ("grafana", &[(3000, 3000, "tcp")]),
];

pub(crate) fn each(check: impl Fn(&Compose, Service<'_>)) {
    for compose in Compose::all() {
        for service in compose.services() {
            check(&compose, service);
        }
    }
}

/// What compose would ask of `.env`: `NAME`, `NAME:-default` or `NAME:?`, as each place has it.
fn asked() -> Vec<String> {
    let mut asked = Vec::new();
    for file in crate::deployments::FILES {
        let text = read(&format!("deployments/{file}")).replace("$$", "");
        let parts = text.split("${").skip(1);
        asked.extend(parts.map(|part| part.split('}').next().unwrap().to_owned()));
    }
    asked
}

fn names_asked() -> BTreeSet<String> {
    let name = |asked: &String| asked.split(':').next().unwrap().to_owned();
    asked().iter().map(name).collect()
}

#[test]
fn example_env_has_the_variables_that_are_asked_and_no_other() {
    let given: BTreeSet<_> = variables(&read("deployments/example.env"))
        .into_keys()
        .collect();
    assert_eq!(given, names_asked());
}

#[test]
fn what_is_not_set_is_refused_or_safe() {
    for asked in asked() {
        let telegram = ["TELEGRAM_API_KEY:-", "TELEGRAM_CHAT_ID:-"];
        assert!(
            asked.ends_with(":?") || asked == "LISTEN:-127.0.0.1" || telegram.contains(&&*asked),
            "${{{asked}}}: empty, where nobody sets it"
        );
    }
}

#[test]
fn ports_are_the_contracts() {
    let mut unset = variables(&read("deployments/example.env"));
    unset.remove("LISTEN").expect("LISTEN in example.env");
    let files = crate::deployments::FILES.map(|file| Compose::load_with(file, &unset));
    let mut found = BTreeMap::new();
    for compose in &files {
        for service in compose.services() {
            if !service.ports().is_empty() {
                found.insert(service.name.to_owned(), service.ports());
            }
            for port in service.list("ports") {
                assert!(
                    port.starts_with("127.0.0.1:"),
                    "{port} is open to the network unless someone asks for it"
                );
            }
        }
    }
    let expected = PORTS.map(|(name, ports)| (name.to_owned(), ports.to_vec()));
    assert_eq!(found, expected.into());
}

#[test]
fn images_are_pinned() {
    let workspace: BTreeMap<String, String> = read("Cargo.toml")
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned()))
        .collect();
    each(|_, service| {
        let (image, tag) = service.text("image").split_once(':').expect("a tag");
        let numbers = tag.trim_start_matches('v').split(['.', '-']);
        let numbers = numbers.take_while(|part| part.parse::<u32>().is_ok());
        assert!(numbers.count() >= 2, "{image}:{tag} names no version");
        if image.starts_with("marketplace/") {
            assert_eq!(tag, workspace["version"], "{image}");
        }
    });
    let services = Compose::load("docker-compose.yaml");
    let kafka = services.service("kafka-1").text("image");
    let tested = format!("<version>{}</version>", kafka.rsplit(':').next().unwrap());
    assert!(
        read(".ci/kafka.pom.xml").contains(&tested),
        "CI tests another Kafka than {kafka}"
    );
}

#[test]
fn nothing_runs_as_root_or_unbounded() {
    each(|_, service| {
        let name = service.name;
        let user: u32 = service
            .text("user")
            .split(':')
            .next()
            .unwrap()
            .parse()
            .expect("a number");
        assert_ne!(user, 0, "{name}");
        assert_eq!(service.list("cap_drop"), ["ALL"], "{name}");
        assert_eq!(
            service.list("security_opt"),
            ["no-new-privileges:true"],
            "{name}"
        );
        assert!(service.memory() > 0, "{name}");
        assert_eq!(
            service.spec["logging"]["options"]["max-size"], "10m",
            "{name} may fill the disk with its log"
        );
        let restart = service.text("restart");
        assert!(
            ["no", "unless-stopped"].contains(&restart),
            "{name}: {restart:?}"
        );
    });
}

#[test]
fn the_readme_states_what_memory_each_file_may_take() {
    let readme = read("README.md");
    for compose in Compose::all() {
        let sum: u64 = compose.services().iter().map(Service::memory).sum();
        let row = readme
            .lines()
            .find(|line| line.contains(&format!("`deployments/{}`", compose.name)));
        let stated = format!("{} MiB", sum >> 20);
        assert!(
            row.is_some_and(|row| row.contains(&stated)),
            "{}: {stated}, the README says {row:?}",
            compose.name
        );
    }
}

#[test]
fn whoever_waits_waits_for_something_that_happens() {
    for compose in Compose::all() {
        for service in compose.services() {
            for (other, condition) in service.waits_for() {
                let other = compose.service(other);
                match condition {
                    "service_completed_successfully" => assert!(other.runs_once()),
                    "service_healthy" => assert!(!other.runs_once() && is_checked(other)),
                    _ => panic!("{} waits for {condition}", service.name),
                }
            }
        }
    }
}

/// Its own health check, or the one that our Dockerfile has.
fn is_checked(service: Service<'_>) -> bool {
    let own = service.spec["healthcheck"]["test"].is_sequence();
    own || service.text("image").starts_with("marketplace/")
}

#[test]
fn whatever_stays_has_a_health_check() {
    each(|_, service| {
        assert!(
            service.runs_once() || is_checked(service),
            "{}",
            service.name
        );
        if service.runs_once() && service.text("image").starts_with("marketplace/") {
            assert_eq!(service.spec["healthcheck"]["disable"], true);
        }
    });
}

#[test]
fn what_is_mounted_exists_and_what_is_kept_is_named() {
    for compose in Compose::all() {
        let declared: BTreeSet<_> = entries(&compose.document["volumes"])
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        let mut used = BTreeSet::new();
        for service in compose.services() {
            for (source, target, options) in service.volumes() {
                assert!(target.starts_with('/'), "{}: {target}", service.name);
                if source.starts_with('.') {
                    assert!(
                        root().join("deployments").join(source).exists(),
                        "{source} is not there"
                    );
                    assert_eq!(options, "ro", "{source} is ours to change");
                } else {
                    used.insert(source);
                }
            }
        }
        assert_eq!(used, declared, "{}", compose.name);
    }
}

#[test]
fn each_image_of_ours_is_built_from_the_repository() {
    let dockerfile = read("deployments/Dockerfile");
    let services = Compose::load("docker-compose.yaml");
    let (mut builds, mut runs) = (BTreeSet::new(), BTreeSet::new());
    for service in services.services() {
        let Some(name) = service.text("image").strip_prefix("marketplace/") else {
            continue;
        };
        let build = &service.spec["build"];
        if build.is_null() {
            // one that another service builds; to pull it would be to run somebody else's
            assert_eq!(service.text("pull_policy"), "never", "{}", service.name);
            runs.insert(name);
            continue;
        }
        // two that build one tag make two images of it, by turns: each `up` would start anew what runs the other
        assert!(builds.insert(name), "{name} is built twice");
        let context = root()
            .join("deployments")
            .join(build["context"].as_str().unwrap());
        let file = build["dockerfile"].as_str().unwrap();
        assert!(context.join(file).exists(), "{file} in the context");
        let stage = format!(" AS {}\n", build["target"].as_str().unwrap());
        assert!(dockerfile.contains(&stage), "no stage{stage}");
        for (argument, _) in entries(&build["args"]) {
            assert!(
                dockerfile.contains(&format!("ARG {argument}\n")),
                "no {argument}"
            );
        }
        let program = build["args"]["SERVICE"].as_str().unwrap();
        assert!(name.starts_with(&format!("{program}:")), "{name}");
        assert!(
            root().join(program).join("src/main.rs").exists(),
            "{program}"
        );
    }
    assert!(runs.is_subset(&builds), "{runs:?} of {builds:?} built");
}

#[test]
fn brokers_find_each_other_and_keep_what_they_acknowledge() {
    let compose = Compose::load("docker-compose.yaml");
    let mut ids = BTreeSet::new();
    let mut clusters = BTreeSet::new();
    for name in ["kafka-1", "kafka-2", "kafka-3"] {
        let settings = compose.service(name).environment();
        let id = &settings["KAFKA_NODE_ID"];
        let voters: Vec<_> = settings["KAFKA_CONTROLLER_QUORUM_VOTERS"]
            .split(',')
            .collect();
        assert!(voters.contains(&format!("{id}@{name}:9093").as_str()));
        assert_eq!(voters.len(), 3);
        assert_eq!(
            settings["KAFKA_ADVERTISED_LISTENERS"],
            format!("PLAINTEXT://{name}:9092")
        );
        assert_eq!(settings["KAFKA_DEFAULT_REPLICATION_FACTOR"], "3");
        assert_eq!(settings["KAFKA_MIN_INSYNC_REPLICAS"], "2");
        assert_eq!(settings["KAFKA_AUTO_CREATE_TOPICS_ENABLE"], "false");
        let kept = settings["KAFKA_LOG_DIRS"].as_str();
        let volumes = compose.service(name).volumes();
        assert!(volumes.iter().any(|(_, target, _)| *target == kept));
        ids.insert(id.clone());
        clusters.insert(settings["CLUSTER_ID"].clone());
    }
    assert_eq!((ids.len(), clusters.len()), (3, 1));
}

#[test]
fn the_runbooks_commands_find_what_they_name() {
    let runbook = read("docs/runbook.md");
    let dc = runbook.lines().find(|line| line.starts_with("dc() {"));
    let dc = dc.expect("what dc is");
    assert!(dc.contains(" --env-file deployments/.env "), "{dc}");
    let files = Compose::all();
    for compose in &files {
        let file = format!(" -f deployments/{} ", compose.name);
        assert!(dc.contains(&file), "{dc}");
    }
    let known = files.iter().flat_map(Compose::services);
    let known: BTreeSet<_> = known.map(|service| service.name).collect();
    let mut named = 0;
    for command in runbook.split("`dc ").skip(1) {
        let command = command.split('`').next().unwrap();
        let mut words = command.split_whitespace();
        let verb = words.next().unwrap();
        assert!(
            ["exec", "logs", "ps", "run", "up"].contains(&verb),
            "{command}"
        );
        // options first, their numbers with them
        let service = words.find(|word| !word.starts_with('-') && word.parse::<u32>().is_err());
        // `<service>` is for the reader to fill in
        if let Some(service) = service.filter(|service| !service.starts_with('<')) {
            assert!(known.contains(service), "{command}");
            named += 1;
        }
    }
    assert!(named >= 5, "{named}");
}
