//! What watches the system, as files: dashboards by the rules that Grafana's own linter has, data sources, alerts and their
//! runbook. Whether a query finds anything is for a real Prometheus to say, in `dashboards`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::{
    deployments::{Compose, SCALED, read},
    promql::selectors,
};

/// The files in `deployments/grafana/dashboards`.
pub(crate) const DASHBOARDS: [&str; 3] = ["business", "services", "kafka"];

pub(crate) fn dashboard(name: &str) -> Value {
    serde_json::from_str(&read(&format!(
        "deployments/grafana/dashboards/{name}.json"
    )))
    .unwrap()
}

/// A dashboard's panels that show something.
pub(crate) fn panels(dashboard: &Value) -> Vec<&Value> {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    panels.filter(|panel| panel["type"] != "row").collect()
}

/// A panel's queries.
pub(crate) fn queries(panel: &Value) -> Vec<&str> {
    let targets = panel["targets"].as_array().unwrap().iter();
    targets
        .map(|target| target["expr"].as_str().unwrap())
        .collect()
}

/// The alerts: name, rule.
pub(crate) fn alerts() -> BTreeMap<String, Value> {
    let rules: Value = serde_yaml::from_str(&read("deployments/prometheus/alerts.yaml")).unwrap();
    let groups = rules["groups"].as_array().unwrap().iter();
    groups
        .flat_map(|group| group["rules"].as_array().unwrap())
        .map(|rule| (rule["alert"].as_str().unwrap().to_owned(), rule.clone()))
        .collect()
}

fn data_sources() -> BTreeMap<String, Value> {
    let file = read("deployments/grafana/provisioning/datasources/datasources.yaml");
    let file: Value = serde_yaml::from_str(&file).unwrap();
    let sources = file["datasources"].as_array().unwrap().iter();
    sources
        .map(|source| (source["uid"].as_str().unwrap().to_owned(), source.clone()))
        .collect()
}

/// The runbook's sections, as links name them.
fn sections() -> BTreeSet<String> {
    let text = read("docs/runbook.md");
    let headings = text.lines().filter_map(|line| line.strip_prefix("### "));
    headings
        .map(|heading| format!("docs/runbook.md#{}", heading.to_lowercase()))
        .collect()
}

#[test]
fn dashboards_are_files_that_nobody_edits_by_hand() {
    let mut uids = BTreeSet::new();
    for name in DASHBOARDS {
        let dashboard = dashboard(name);
        assert!(uids.insert(dashboard["uid"].as_str().unwrap().to_owned()));
        assert_eq!(dashboard["editable"], false, "{name}");
        assert_eq!(dashboard["refresh"], "5s", "{name}");
        assert_eq!(dashboard["tags"], serde_json::json!(["marketplace"]));
        for text in ["title", "description"] {
            assert!(
                dashboard[text]
                    .as_str()
                    .is_some_and(|text| !text.is_empty())
            );
        }
        let ids: BTreeSet<_> = dashboard["panels"]
            .as_array()
            .unwrap()
            .iter()
            .map(|panel| panel["id"].as_u64().unwrap())
            .collect();
        assert_eq!(ids.len(), dashboard["panels"].as_array().unwrap().len());
        assert_no_overlap(name, &dashboard);
    }
}

fn assert_no_overlap(name: &str, dashboard: &Value) {
    let mut taken = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{name}: {}", panel["title"]);
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(taken.insert((x, y)), "{name}: {}", panel["title"]);
            }
        }
    }
}

#[test]
fn panels_say_what_they_show() {
    let (sources, sections) = (data_sources(), sections());
    for name in DASHBOARDS {
        let dashboard = dashboard(name);
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().unwrap();
            let description = panel["description"].as_str().unwrap();
            assert!(
                !title.is_empty() && !description.is_empty(),
                "{name} {title}"
            );
            let unit = &panel["fieldConfig"]["defaults"]["unit"];
            assert!(unit.is_string(), "{name} {title} has no unit");
            let source = panel["datasource"]["uid"].as_str().unwrap();
            assert!(sources.contains_key(source), "{name} {title}: {source}");
            if let Some((_, section)) = description.split_once("docs/runbook.md") {
                let section = format!("docs/runbook.md{}", section.trim_end_matches('.'));
                assert!(sections.contains(&section), "{name} {title}: {section}");
            }
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{name} {title}");
            let ids: BTreeSet<_> = targets
                .iter()
                .map(|target| target["refId"].as_str().unwrap())
                .collect();
            assert_eq!(ids.len(), targets.len(), "{name} {title}");
            for target in targets {
                let legend = target["legendFormat"].as_str().unwrap();
                assert!(!legend.is_empty(), "{name} {title}");
                assert_eq!(target["datasource"], panel["datasource"], "{name} {title}");
            }
        }
    }
}

#[test]
fn queries_are_written_as_they_should_be() {
    for name in DASHBOARDS {
        let dashboard = dashboard(name);
        let variables: BTreeSet<_> = dashboard["templating"]["list"]
            .as_array()
            .unwrap()
            .iter()
            .map(|variable| variable["name"].as_str().unwrap())
            .collect();
        for panel in panels(&dashboard) {
            for query in queries(panel) {
                // a window of its own would miss samples, or show the same ones twice, at another resolution
                for range in query.split('[').skip(1) {
                    let range = range.split(']').next().unwrap();
                    assert!(["$__rate_interval", "$__range"].contains(&range), "{query}");
                }
                // a counter says something only by how it grows
                for selector in selectors(query) {
                    let counts = ["_total", "_count", "_sum", "_bucket"];
                    let counts = counts.iter().any(|end| selector.names[0].ends_with(end));
                    assert_eq!(counts, selector.ranged, "{query}: {selector:?}");
                }
                if query.contains("histogram_quantile") {
                    assert!(query.contains("le)"), "{query}");
                }
                for variable in query.split('$').skip(1) {
                    let end = variable.find(|c: char| c != '_' && !c.is_alphanumeric());
                    let variable = &variable[..end.unwrap_or(variable.len())];
                    assert!(
                        variable.starts_with("__") || variables.contains(variable),
                        "{query}: {variable}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_line_of_a_method_leads_to_its_traces() {
    let services = dashboard("services");
    let mut linked = 0;
    for panel in panels(&services) {
        for link in panel["fieldConfig"]["defaults"]["links"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let url = link["url"].as_str().unwrap();
            let (_, panes) = url.split_once("&panes=").unwrap();
            let panes = panes
                .replace("%22", "\"")
                .replace("%7B", "{")
                .replace("%7D", "}")
                .replace("%5B", "[")
                .replace("%5D", "]");
            let panes: Value = serde_json::from_str(&panes).unwrap();
            let source = panes["a"]["datasource"].as_str().unwrap();
            assert_eq!(data_sources()[source]["type"], "jaeger");
            // both labels must be in the line for Grafana to fill them in
            for query in queries(panel) {
                assert!(query.contains("job, method"), "{query}");
            }
            linked += 1;
        }
    }
    assert!(linked >= 2, "rate and latency");
}

#[test]
fn data_sources_lead_to_what_runs() {
    let logs = Compose::load("docker-compose.logs.yaml");
    let sources = data_sources();
    for source in sources.values() {
        let url = source["url"].as_str().unwrap();
        let host = url.strip_prefix("http://").unwrap();
        logs.service(host.split(':').next().unwrap());
    }
    let scrape: Value =
        serde_yaml::from_str(&read("deployments/prometheus/prometheus.yaml")).unwrap();
    assert_eq!(scrape["global"]["scrape_interval"], "5s");
    assert_eq!(sources["prometheus"]["jsonData"]["timeInterval"], "5s");
    let jaeger = &sources["jaeger"]["jsonData"];
    for link in ["tracesToLogsV2", "tracesToMetrics"] {
        let target = jaeger[link]["datasourceUid"].as_str().unwrap();
        assert!(sources.contains_key(target), "{link}");
    }
    let image = logs.service("opensearch").text("image");
    let version = sources["graylog"]["jsonData"]["version"].as_str().unwrap();
    assert!(image.ends_with(&format!(":{version}")), "{image}");
    let plugin = sources["graylog"]["type"].as_str().unwrap();
    let grafana = logs.service("grafana").environment();
    assert!(grafana["GF_PLUGINS_PREINSTALL"].starts_with(plugin));
}

#[test]
fn what_is_provisioned_is_mounted() {
    let logs = Compose::load("docker-compose.logs.yaml");
    let mounted = |service: &str, target: &str| {
        let volumes = logs.service(service).volumes();
        let found = volumes.into_iter().find(|volume| volume.1 == target);
        let (source, ..) = found.unwrap_or_else(|| panic!("{service} has no {target}"));
        format!("deployments/{source}")
    };
    let provider = "deployments/grafana/provisioning/dashboards/dashboards.yaml";
    let provider: Value = serde_yaml::from_str(&read(provider)).unwrap();
    let folder = provider["providers"][0]["options"]["path"]
        .as_str()
        .unwrap();
    let source = mounted("grafana", folder);
    for name in DASHBOARDS {
        read(&format!("{source}/{name}.json"));
    }
    let environment = logs.service("grafana").environment();
    let home = &environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"];
    read(&format!(
        "{source}/{}",
        home.strip_prefix(&format!("{folder}/")).unwrap()
    ));
    mounted("grafana", "/etc/grafana/provisioning");

    let flag = |service: &str, name: &str| {
        let commands = logs.service(service).list("command");
        let found = commands.iter().find_map(|word| word.strip_prefix(name));
        found.unwrap().trim_start_matches('=').to_owned()
    };
    let config = flag("prometheus", "--config.file");
    let config: Value = serde_yaml::from_str(&read(&mounted("prometheus", &config))).unwrap();
    for file in config["rule_files"].as_array().unwrap() {
        mounted(
            "prometheus",
            &format!("/etc/prometheus/{}", file.as_str().unwrap()),
        );
    }
    let links = mounted("jaeger", &flag("jaeger", "--query.ui-config"));
    let links: Value = serde_json::from_str(&read(&links)).unwrap();
    let url = links["linkPatterns"][0]["url"].as_str().unwrap();
    assert!(url.starts_with("http://localhost:7555/"), "Graylog's port");
}

#[test]
fn prometheus_asks_each_replica_at_its_http_port() {
    let config: Value =
        serde_yaml::from_str(&read("deployments/prometheus/prometheus.yaml")).unwrap();
    let mut asked = BTreeMap::new();
    for job in config["scrape_configs"].as_array().unwrap() {
        let name = job["job_name"].as_str().unwrap();
        if name == "prometheus" {
            let own = job["static_configs"][0]["targets"][0].as_str();
            assert_eq!(own, Some("localhost:9090"));
            continue;
        }
        // a name has as many addresses as the service has replicas; a fixed target is one of them
        assert!(job["static_configs"].is_null(), "{name}");
        let found = &job["dns_sd_configs"][0];
        assert_eq!(
            (&found["names"][0], &found["type"]),
            (&name.into(), &"A".into())
        );
        assert_eq!(found["refresh_interval"], "5s", "{name}");
        asked.insert(name, found["port"].as_u64().unwrap());
    }
    let expected = SCALED.map(|(name, _, http)| (name, u64::from(http)));
    assert_eq!(asked, expected.into());
}

#[test]
fn each_alert_has_a_section_and_a_test() {
    let alerts = alerts();
    for required in [
        "ErrorRate",
        "Latency",
        "OutboxOld",
        "DeadLetters",
        "ExpiryLate",
        "StockDrift",
        "PoolExhausted",
        "ConsumerLag",
    ] {
        assert!(alerts.contains_key(required), "{required}");
    }
    let mut linked = BTreeSet::new();
    for (name, alert) in &alerts {
        let severity = alert["labels"]["severity"].as_str().unwrap();
        assert!(["page", "ticket"].contains(&severity), "{name}");
        assert!(alert["annotations"]["summary"].is_string(), "{name}");
        let runbook = alert["annotations"]["runbook"].as_str().unwrap();
        assert_eq!(runbook, format!("docs/runbook.md#{}", name.to_lowercase()));
        linked.insert(runbook.to_owned());
    }
    assert_eq!(linked, sections(), "a section for each alert, and no other");

    let tests: Value =
        serde_yaml::from_str(&read("deployments/prometheus/alerts_test.yaml")).unwrap();
    let mut fired = BTreeSet::new();
    for case in tests["tests"].as_array().unwrap() {
        for check in case["alert_rule_test"].as_array().unwrap() {
            if !check["exp_alerts"].as_array().unwrap().is_empty() {
                fired.insert(check["alertname"].as_str().unwrap().to_owned());
            }
        }
    }
    assert!(fired.iter().eq(alerts.keys()), "{fired:?}");
}
