//! Every query of every dashboard, alert and link, asked of a real Prometheus that scrapes a stack with some life in it: a
//! query that finds nothing is one that shows nobody anything, whatever happens.

use std::{collections::BTreeSet, net::TcpListener, process::Stdio, time::Duration};

use devstack::{
    broker,
    clients::{Clients, period_around_now},
    retail,
    stack::{Options, Stack},
};
use proto::{
    cart::{AddToCartRequest, ListCartRequest, PurchaseRequest},
    loms::{
        CancelOrderRequest, CreateOrderRequest, CreateOrderResponse, OrderItem, OrderPayedRequest,
    },
    notifications::GetHistoryWithPeriodRequest,
};
use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord},
};
use serde_json::Value;
use tokio::{
    process::{Child, Command},
    time::Instant,
};

use crate::{
    deployments::read,
    monitoring::{DASHBOARDS, alerts, dashboard, panels, queries},
    promql::selectors,
    test_stack::binaries,
};

const HEART: u32 = 85_123_001;
const BABUSHKA: u32 = 22_752_000;
/// Scrapes, rates over them and an order that expires: seconds, on a machine that also compiles.
const PATIENCE: Duration = Duration::from_secs(120);

struct Prometheus {
    process: Child,
    url: String,
    http: reqwest::Client,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    /// With the deployed configuration, but for where the services are and how often they are asked.
    async fn start(stack: &Stack) -> Prometheus {
        let dir = tempfile::tempdir().unwrap();
        let mut config = read("deployments/prometheus/prometheus.yaml");
        let mut replace = |from: &str, to: &str| {
            assert!(config.contains(from), "{from}");
            config = config.replace(from, to);
        };
        replace("scrape_interval: 5s", "scrape_interval: 500ms");
        replace("scrape_timeout: 4s", "scrape_timeout: 400ms");
        replace("evaluation_interval: 5s", "evaluation_interval: 500ms");
        for (name, port) in [("checkout", 8090), ("loms", 8081), ("notifications", 8082)] {
            let http = stack.service(name).unwrap().http();
            replace(
                &format!(
                    "dns_sd_configs: [{{names: [{name}], type: A, port: {port}, refresh_interval: 5s}}]"
                ),
                &format!("static_configs: [{{targets: [\"{http}\"]}}]"),
            );
        }
        std::fs::write(dir.path().join("prometheus.yaml"), &config).unwrap();
        let rules = read("deployments/prometheus/alerts.yaml");
        std::fs::write(dir.path().join("alerts.yaml"), rules).unwrap();

        // free a moment ago, and nobody else in this test looks for one
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let process = Command::new("prometheus")
            .args(["--config.file=prometheus.yaml", "--storage.tsdb.path=data"])
            .arg(format!("--web.listen-address={address}"))
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .expect(
                "prometheus in PATH: run these tests through .ci/deployments, which installs it",
            );
        let mut prometheus = Prometheus {
            process,
            url: format!("http://{address}"),
            http: devstack::clients::http_client().unwrap(),
            _dir: dir,
        };
        prometheus.wait_ready().await;
        prometheus
    }

    async fn wait_ready(&mut self) {
        let by = Instant::now() + Duration::from_secs(30);
        let url = format!("{}/-/ready", self.url);
        loop {
            let answer = self.http.get(&url).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return;
            }
            if let Some(ended) = self.process.try_wait().unwrap() {
                let log = std::fs::read_to_string(self._dir.path().join("log"));
                panic!("prometheus ended: {ended}\n{}", log.unwrap_or_default());
            }
            assert!(Instant::now() < by, "prometheus was not ready in time");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Whether a query finds a number; one that Prometheus does not take fails the test.
    async fn finds(&self, query: &str) -> bool {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let url = format!("{}/api/v1/query?query={encoded}", self.url);
        let answer = self.http.get(&url).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        let found = answer["data"]["result"].as_array().unwrap().iter();
        let mut numbers = found.map(|series| series["value"][1].as_str().unwrap());
        numbers.any(|number| number.parse::<f64>().unwrap().is_finite())
    }
}

/// What Grafana would fill in; windows as short as the scrapes here.
fn filled(query: &str) -> String {
    query
        .replace("$__rate_interval", "10s")
        .replace("$__range", "1m")
        .replace("$service", "checkout|loms|notifications")
        .replace("$$__tags", "job=\"loms\"")
}

/// An alert's expression without its threshold: an alert whose series do not exist never fires.
fn measured(expression: &str) -> &str {
    let expression = expression.trim();
    let at = expression.rfind(['<', '>']).expect("a threshold");
    assert!(expression[at + 1..].trim().parse::<f64>().is_ok());
    expression[..at].trim()
}

fn all_queries() -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for name in DASHBOARDS {
        let dashboard = dashboard(name);
        for panel in panels(&dashboard) {
            all.extend(queries(panel).into_iter().map(filled));
        }
        for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
            all.insert(filled(annotation["expr"].as_str().unwrap()));
        }
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            let query = variable["definition"].as_str().unwrap();
            let query = query.strip_prefix("label_values(").unwrap();
            all.insert(query.rsplit_once(", ").unwrap().0.to_owned());
        }
    }
    let sources = read("deployments/grafana/provisioning/datasources/datasources.yaml");
    let sources: Value = serde_yaml::from_str(&sources).unwrap();
    for source in sources["datasources"].as_array().unwrap() {
        let links = source["jsonData"]["tracesToMetrics"]["queries"].as_array();
        for link in links.into_iter().flatten() {
            all.insert(filled(link["query"].as_str().unwrap()));
        }
    }
    for alert in alerts().values() {
        all.insert(measured(alert["expr"].as_str().unwrap()).to_owned());
    }
    // an `or` hides a name that is misspelt: every name and every label must be there by itself
    let selectors: Vec<_> = all.iter().flat_map(|query| selectors(query)).collect();
    for selector in selectors {
        for name in selector.names.iter().filter(|name| !name.is_empty()) {
            let labels: Vec<_> = selector
                .labels
                .iter()
                .map(|label| format!("{label}!=\"\""))
                .collect();
            all.insert(format!("{name}{{{}}}", labels.join(",")));
        }
    }
    all
}

/// What the retail stock has ten of, again and again.
fn in_stock() -> impl Iterator<Item = u32> {
    let lines = retail::STOCK_CSV.lines().skip(1);
    let skus: Vec<u32> = lines
        .map(|line| line.split(',').collect::<Vec<_>>())
        .filter(|fields| fields[2].parse::<u32>().unwrap() >= 10)
        .map(|fields| fields[1].parse().unwrap())
        .collect();
    skus.into_iter().cycle()
}

/// A round of everything that moves a number.
struct Life {
    clients: Clients,
    events: FutureProducer,
    skus: Box<dyn Iterator<Item = u32>>,
    round: i64,
}

impl Life {
    async fn round(&mut self) {
        self.round += 1;
        let user = self.round;
        self.shop(user).await;
        let unpaid = self.create(user, HEART, 1).await;
        assert_eq!(unpaid.status, "awaiting payment");
        let failed = self.create(user, BABUSHKA, 1_000).await;
        assert_eq!(failed.status, "failed");
        let cancelled = self.create(user, HEART, 1).await.order_id;
        let request = CancelOrderRequest {
            order_id: cancelled,
        };
        self.clients.loms.cancel_order(request).await.unwrap();
        let (from, to) = period_around_now();
        let request = GetHistoryWithPeriodRequest {
            user,
            from: Some(from),
            to: Some(to),
            ..Default::default()
        };
        let history = self.clients.notifications.get_history_with_period(request);
        history.await.unwrap();
        let poison = FutureRecord::<(), str>::to("orders").payload("no event");
        self.events.send(poison, PATIENCE).await.unwrap();
    }

    async fn shop(&mut self, user: i64) {
        let cart = &mut self.clients.cart;
        // another one each time: its name and price are in no cache
        let sku = self.skus.next().expect("a catalogue that does not end");
        let mut add = AddToCartRequest {
            user,
            sku,
            count: 1,
        };
        cart.add_to_cart(add).await.unwrap();
        add.count = 60_000;
        cart.add_to_cart(add).await.expect_err("nobody has so many");
        cart.list_cart(ListCartRequest { user }).await.unwrap();
        let request = PurchaseRequest {
            user,
            ..Default::default()
        };
        let order_id = cart.purchase(request).await.unwrap().into_inner().order_id;
        let request = OrderPayedRequest { order_id };
        self.clients.loms.order_payed(request).await.unwrap();
    }

    async fn create(&mut self, user: i64, sku: u32, count: u32) -> CreateOrderResponse {
        let request = CreateOrderRequest {
            user,
            items: vec![OrderItem { sku, count }],
            ..Default::default()
        };
        let created = self.clients.loms.create_order(request).await;
        created.unwrap().into_inner()
    }
}

#[tokio::test]
async fn every_query_finds_something() {
    let options = Options {
        quiet: true,
        payment_timeout: "2s",
        broker: broker::Source::Mock,
        ..Options::new(binaries().await)
    };
    let stack = Stack::start(&options).await.expect("the stack starts");
    stack.receive_retail_stock().await.unwrap();
    let prometheus = Prometheus::start(&stack).await;
    let events = ClientConfig::new()
        .set("bootstrap.servers", stack.backing().1.join(","))
        .create()
        .unwrap();
    let mut life = Life {
        clients: stack.clients().unwrap(),
        events,
        skus: Box::new(in_stock()),
        round: 0,
    };

    let mut missing = all_queries();
    let asked = missing.len();
    let by = Instant::now() + PATIENCE;
    while !missing.is_empty() {
        life.round().await;
        let mut still = BTreeSet::new();
        for query in missing {
            if !prometheus.finds(&query).await {
                still.insert(query);
            }
        }
        missing = still;
        if Instant::now() > by {
            let list = missing.into_iter().collect::<Vec<_>>().join("\n\n");
            panic!("of {asked} queries these find nothing:\n\n{list}");
        }
    }
    stack.stop().await.expect("the stack stops");
}
