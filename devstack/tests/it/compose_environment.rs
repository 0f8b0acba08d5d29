//! What compose tells the services: the example configurations, read with the environment that the containers get, lead to
//! neighbours that are there.

use std::net::SocketAddr;

use crate::deployments::{Compose, SCALED, Service, expand_all, read, root};

/// Its configuration as the process in the container reads it.
fn configuration(service: Service<'_>) -> serde_yaml::Value {
    let environment = service.environment();
    let (source, ..) = service
        .volumes()
        .into_iter()
        .find(|(_, target, _)| *target == "/app/config.yaml")
        .expect("a configuration");
    let text = read(&format!("deployments/{source}"));
    for name in environment.keys() {
        assert!(
            text.contains(&format!("${{{name}")),
            "{source} has no use for {name}"
        );
    }
    let mut document = serde_yaml::from_str(&text).expect("YAML");
    expand_all(&mut document, &|name| environment.get(name).cloned());
    document
}

/// `host:port` of somebody in the project who listens there.
fn assert_reachable(compose: &Compose, address: &str, ports: &[u16]) {
    let (host, port) = address.rsplit_once(':').expect("host:port");
    compose.service(host);
    assert!(
        ports.contains(&port.parse().unwrap()),
        "{host} does not listen on {port}"
    );
}

#[test]
fn services_are_told_where_their_neighbours_are() {
    let compose = Compose::load("docker-compose.yaml");
    let logs = Compose::load("docker-compose.logs.yaml");
    for (name, grpc, http) in SCALED {
        let service = compose.service(name);
        let config = configuration(service);
        for (door, port) in [("grpc", grpc), ("http", http)] {
            let listen = config[door]["listen"].as_str().unwrap();
            let listen: SocketAddr = listen.parse().unwrap();
            assert!(listen.ip().is_unspecified(), "{name}: {listen}");
            assert_eq!(listen.port(), port, "{name}");
        }
        assert_eq!(
            service.spec["build"]["args"]["HEALTH_PORT"],
            http.to_string().as_str()
        );
        let database = config["postgres"]["connection_string"].as_str().unwrap();
        let (_, after) = database.split_once('@').unwrap();
        let address = after.split('/').next().unwrap();
        assert_eq!(address, format!("{name}-db:5432"));
        assert_reachable(&compose, address, &[5432]);
        assert_eq!(config["jaeger"]["host"], "jaeger", "{name}");
        logs.service("jaeger");
        assert_eq!(config["graylog"]["host"], "graylog", "{name}");
        let gelf = config["graylog"]["port"].as_u64().unwrap();
        let inputs = read("deployments/graylog/inputs.sh");
        assert!(
            inputs.contains(&format!("\nensure {name} {gelf}\n")),
            "{name} sends its log to {gelf}"
        );
        let graylog = logs.service("graylog").ports();
        assert!(graylog.iter().any(|(_, port, _)| u64::from(*port) == gelf));
        for brokers in config["brokers"].as_sequence().into_iter().flatten() {
            let brokers: Vec<_> = brokers.as_str().unwrap().split(',').collect();
            assert_eq!(brokers.len(), 3);
            for broker in brokers {
                assert_reachable(&compose, broker, &[9092]);
            }
        }
    }
    let checkout = configuration(compose.service("checkout"));
    let neighbours = &checkout["services"];
    assert_reachable(&compose, neighbours["loms"].as_str().unwrap(), &[50052]);
    assert_reachable(&compose, neighbours["products"].as_str().unwrap(), &[50054]);
    let products = compose.service("products");
    assert!(
        products.list("command").contains(&"--listen=0.0.0.0:50054"),
        "the stand-in listens where it is looked for"
    );
    let token = format!("--token={}", checkout["token"].as_str().unwrap());
    assert!(products.list("command").contains(&token.as_str()));
}

#[test]
fn the_operator_can_show_who_he_is() {
    let compose = Compose::load("docker-compose.yaml");
    let loms = configuration(compose.service("loms"));
    assert_eq!(loms["tls"]["client_auth"], "optional");
    // what signs the set that the one-shot makes is what LOMS verifies callers by
    let made = compose.service("certs");
    assert_eq!(made.list("command"), ["certs", "--dir=owners", "--apart"]);
    let mounted = compose.service("loms").volumes();
    assert!(mounted.contains(&("loms-certs", "/app/certs", "ro")));
    assert_eq!(loms["tls"]["client_ca"], "certs/ca.pem");
    assert!(devstack::certs::owners().any(|owner| owner == devstack::certs::OPERATOR));
    let example: serde_yaml::Value =
        serde_yaml::from_str(&read("loms/config.example.yaml")).unwrap();
    let alone =
        crate::deployments::expand(example["tls"]["client_auth"].as_str().unwrap(), &|_| None);
    assert_eq!(alone, "none", "who sets nothing asks nobody");
}

#[test]
fn a_container_has_the_time_that_its_service_takes_to_stop() {
    let compose = Compose::load("docker-compose.yaml");
    let seconds = |text: &serde_yaml::Value| -> u64 {
        let text = text.as_str().unwrap();
        text.strip_suffix('s').unwrap().parse().unwrap()
    };
    for name in ["checkout", "loms", "notifications"] {
        let config = configuration(compose.service(name));
        let takes = seconds(&config["shutdown_delay"]) + seconds(&config["shutdown_grace"]);
        assert!(
            takes > seconds(&config["shutdown_grace"]),
            "{name} has no delay"
        );
        let has = seconds(&compose.service(name).spec["stop_grace_period"]);
        assert!(has >= takes + 5, "{name}: {has} s");
    }
}

#[test]
fn databases_are_made_as_the_services_name_them() {
    let compose = Compose::load("docker-compose.yaml");
    for name in ["checkout", "loms", "notifications"] {
        let config = configuration(compose.service(name));
        assert_eq!(
            config,
            configuration(compose.service(&format!("{name}-migrate")))
        );
        let made = compose.service(&format!("{name}-db")).environment();
        let expected = format!(
            "postgres://{}:{}@{name}-db:5432/{}",
            made["POSTGRES_USER"], made["POSTGRES_PASSWORD"], made["POSTGRES_DB"]
        );
        assert_eq!(config["postgres"]["connection_string"], expected.as_str());
    }
}

#[tokio::test]
async fn services_take_the_environment_that_compose_gives_them() {
    let compose = Compose::load("docker-compose.yaml");
    let binaries = crate::test_stack::binaries().await;
    for name in ["checkout", "loms", "notifications"] {
        // nobody listens on port 1: whatever is wrong with the configuration would be said before
        let environment = compose
            .service(name)
            .environment()
            .into_iter()
            .map(|(key, value)| {
                (
                    key,
                    value.replace(&format!("{name}-db:5432"), "127.0.0.1:1"),
                )
            });
        let output = tokio::process::Command::new(binaries.service(name).unwrap())
            .args(["migrate", "--wait", "0s", "--config"])
            .arg(root().join(name).join("config.example.yaml"))
            .env_clear()
            .envs(environment)
            .output()
            .await
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            stderr.contains("PostgreSQL at 127.0.0.1:1"),
            "{name}: {stderr}"
        );
    }
}
