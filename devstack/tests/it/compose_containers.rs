//! What a container of the compose files is, has and leaves: one of several replicas, a process that adopts nobody, its own
//! key, no volume without a name.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    compose::each,
    deployments::{Compose, SCALED, read},
};

#[test]
fn replicas_have_no_port_of_their_own_and_the_gateway_knows_them() {
    let compose = Compose::load("docker-compose.yaml");
    let gateway = compose.service("gateway");
    let config = "/usr/local/etc/haproxy/haproxy.cfg";
    let mounted = gateway.volumes();
    assert_eq!(mounted, [("./haproxy/haproxy.cfg", config, "ro")]);
    let config = read("deployments/haproxy/haproxy.cfg");
    let mut behind = BTreeMap::new();
    for listen in config.split("\nlisten ").skip(1) {
        let bound = listen.split_once("bind :").expect("a port").1;
        let bound: u16 = bound.lines().next().unwrap().parse().unwrap();
        let server = listen.split_once("server-template ").expect("servers").1;
        let server = server.lines().next().unwrap().rsplit(' ').next().unwrap();
        behind.insert(bound, server.to_owned());
    }
    let mut expected = BTreeMap::new();
    for (name, grpc, http) in SCALED {
        let service = compose.service(name);
        assert!(service.ports().is_empty(), "{name}: one replica's only");
        assert!(service.spec["container_name"].is_null(), "{name}: one name");
        expected.extend([grpc, http].map(|port| (port, format!("{name}:{port}"))));
    }
    assert_eq!(behind, expected);
    let published = gateway.ports().into_iter().map(|(_, inside, _)| inside);
    assert!(published.collect::<BTreeSet<_>>().iter().eq(behind.keys()));
}

/// Seconds of a health check's bound: a check that is killed says nothing about the one who is asked.
const PATIENCE: u64 = 10;

#[test]
fn a_health_check_leaves_nobody_behind() {
    each(|_, service| {
        let name = service.name;
        // process 1 takes an orphan's end for its own child's: PostgreSQL for a crash
        assert_eq!(service.spec["init"], true, "{name}");
        let check = &service.spec["healthcheck"];
        let words = check["test"].as_sequence().into_iter().flatten();
        let words: Vec<_> = words.map(|word| word.as_str().unwrap()).collect();
        let script = match words.as_slice() {
            [] => return,
            ["CMD-SHELL", script] => script,
            ["CMD", "bash" | "sh", "-c", script] => script,
            ["CMD", ..] => "exec",
            _ => panic!("{name}: {words:?}"),
        };
        assert!(script.starts_with("exec"), "{name}: {script} is a child");
        let bound = check["timeout"].as_str().unwrap().trim_end_matches('s');
        assert!(bound.parse::<u64>().unwrap() >= PATIENCE, "{name}: {bound}");
    });
    let dockerfile = read("deployments/Dockerfile");
    let check = dockerfile
        .lines()
        .find(|line| line.starts_with("HEALTHCHECK"));
    let bound = check.unwrap().split_once("--timeout=").unwrap().1;
    let bound = bound.split_once('s').unwrap().0;
    assert!(bound.parse::<u64>().unwrap() >= PATIENCE, "{bound}");
}

/// The volumes that each image declares: of each that nothing is mounted on, every new container leaves one behind.
const DECLARED: [(&str, &[&str]); 12] = [
    ("marketplace/checkout", &[]),
    ("marketplace/loms", &[]),
    ("marketplace/notifications", &[]),
    ("marketplace/devstack", &[]),
    ("postgres", &["/var/lib/postgresql/data"]),
    (
        "apache/kafka",
        &[
            "/etc/kafka/secrets",
            "/mnt/shared/config",
            "/var/lib/kafka/data",
        ],
    ),
    ("haproxy", &[]),
    ("graylog/graylog", &["/usr/share/graylog/data"]),
    ("curlimages/curl", &[]),
    ("mongo", &["/data/db", "/data/configdb"]),
    ("jaegertracing/all-in-one", &["/tmp"]),
    ("prom/prometheus", &["/prometheus"]),
];
/// Images that declare none, of others.
const NONE_DECLARED: [&str; 2] = ["opensearchproject/opensearch", "grafana/grafana"];

#[test]
fn no_container_leaves_a_volume_without_a_name() {
    assert!(!read("deployments/Dockerfile").contains("\nVOLUME"));
    each(|_, service| {
        let image = service.text("image").split(':').next().unwrap();
        let declared = DECLARED.iter().find(|(name, _)| *name == image);
        let declared = match declared {
            Some((_, volumes)) => *volumes,
            None if NONE_DECLARED.contains(&image) => &[],
            None => panic!("which volumes does {image} declare?"),
        };
        let volumes = service.volumes().into_iter().map(|(_, target, _)| target);
        let mounted: BTreeSet<_> = volumes.chain(service.tmpfs()).collect();
        for volume in declared {
            assert!(mounted.contains(volume), "{}: {volume}", service.name);
        }
    });
}

/// Who shows a certificate in the stack; the service `gateway` passes TLS through.
const SERVERS: [&str; 4] = ["checkout", "loms", "notifications", "products"];

#[test]
fn an_owner_mounts_its_own_key_and_nobody_elses() {
    let compose = Compose::load("docker-compose.yaml");
    let owners: BTreeSet<_> = devstack::certs::owners().collect();
    for service in compose.services() {
        let name = service.name;
        let mounted: Vec<_> = service
            .volumes()
            .into_iter()
            .filter(|(source, ..)| source.ends_with("certs"))
            .collect();
        let own = format!("{name}-certs");
        if name == "certs" {
            // who makes them has them all; it is gone when the others start
            assert!(service.runs_once());
            let mut made = BTreeSet::new();
            for (source, target, options) in mounted {
                let owner = source.strip_suffix("-certs").expect("an owner's");
                assert_eq!(target, format!("/app/owners/{owner}"));
                assert_eq!(options, "");
                made.insert(owner);
            }
            assert_eq!(made, owners);
        } else if SERVERS.contains(&name) {
            assert_eq!(mounted, [(own.as_str(), "/app/certs", "ro")], "{name}");
        } else {
            assert_eq!(mounted, [], "{name} shows no certificate");
        }
    }
    // a volume takes its owner from the folder that it is mounted on
    let dockerfile = read("deployments/Dockerfile");
    for owner in owners {
        assert!(dockerfile.contains(&format!("/app/owners/{owner}")));
    }
}
