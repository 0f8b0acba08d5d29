//! The whole system on one machine: PostgreSQL, a broker, the ProductService stand-in and the three services as processes
//! with TLS between them. Nothing of it outlives us: children end when their stdin closes.

use std::{
    fs::Permissions,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{
    binaries::{Binaries, SERVICES},
    broker::{self, Broker},
    certs,
    clients::Clients,
    ports::{Ports, Reserved},
    postgres::{self, Server},
    products::{self, StandIn},
    retail,
    service::{self, Finished, Service, merge},
};

/// Migrated databases, open doors, a consumer that may still join: seconds, on a busy machine more.
const READY_BOUND: Duration = Duration::from_secs(30);

/// What differs between one stack and another.
pub struct Options {
    pub binaries: Binaries,
    pub ports: Ports,
    /// A folder of certificates; a set of its own without.
    pub certs: Option<PathBuf>,
    /// How long an order may stay unpaid, as humantime writes it.
    pub payment_timeout: &'static str,
    pub limits: products::Limits,
    /// Which of [`SERVICES`] run.
    pub services: &'static [&'static str],
    pub postgres: postgres::Source,
    pub broker: broker::Source,
    /// By service, what its configuration says besides: `{"loms": {"limits": {"in_flight": 8}}}`.
    pub settings: Value,
    /// Whether to say on stderr what starts.
    pub quiet: bool,
}

impl Options {
    /// Free ports, certificates of its own, everything else as in production.
    pub fn new(binaries: Binaries) -> Options {
        let limits = products::Limits::default();
        Options {
            binaries,
            ports: Ports::Free,
            certs: None,
            payment_timeout: "10m",
            services: &SERVICES,
            limits,
            postgres: postgres::Source::Environment,
            broker: broker::Source::Environment,
            settings: Value::Null,
            quiet: false,
        }
    }
}

/// A system that runs. [`Stack::stop`] ends it tidily; dropped, it ends by itself a moment later.
pub struct Stack {
    services: Vec<Service>,
    products: StandIn,
    broker: Broker,
    postgres: Server,
    /// The name of each service's database and its owner's URL, in the order of [`SERVICES`].
    databases: Vec<(String, String)>,
    /// The services' ports: one that is killed finds its own free.
    ports: Vec<Reserved>,
    certs: PathBuf,
    binaries: Binaries,
    /// Configurations, logs and certificates of this run; mode 0700, removed at the end.
    dir: tempfile::TempDir,
}

impl Stack {
    /// Starts everything and waits until every service is ready.
    pub async fn start(options: &Options) -> Result<Stack> {
        let say = |what: &str, since: Instant| {
            if !options.quiet {
                eprintln!("  {what} ({:.1} s)", since.elapsed().as_secs_f32());
            }
        };
        let run = uuid::Uuid::new_v4().simple().to_string()[..12].to_owned();
        let dir = tempfile::Builder::new()
            .prefix("devstack-")
            // keys and connection strings are in there
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .context("make a temporary folder")?;
        let certs = match &options.certs {
            Some(certs) => std::path::absolute(certs)?,
            None => {
                let certs = dir.path().join("certs");
                certs::write(&certs, certs::Layout::Together)?;
                certs
            }
        };
        let since = Instant::now();
        let (postgres, broker) = tokio::try_join!(
            Server::start(options.binaries.devstack(), options.postgres),
            Broker::start(&options.broker, options.binaries.devstack(), &run)
        )?;
        say(
            &format!("{}, {}", postgres.description(), broker.description()),
            since,
        );
        let products = StandIn::start(stand_in(options, &certs)?).await?;
        let binaries = options.binaries.clone();
        let mut stack = Stack {
            services: Vec::new(),
            products,
            broker,
            postgres,
            databases: Vec::new(),
            ports: Vec::new(),
            certs,
            binaries,
            dir,
        };
        let since = Instant::now();
        if let Err(error) = stack.start_services(options, &run).await {
            // the databases on a server that outlives us go, whatever happened
            let _ = stack.stop().await;
            return Err(error);
        }
        say(
            &format!("{}: migrated, started, ready", options.services.join(", ")),
            since,
        );
        Ok(stack)
    }

    async fn start_services(&mut self, options: &Options, run: &str) -> Result<()> {
        let mut doors = Vec::new();
        for name in SERVICES {
            let database = format!("devstack_{run}_{name}");
            let url = self.postgres.create_database(&database, name).await?;
            self.databases.push((database, url));
            let (grpc, http) = options.ports.of(name);
            doors.push((self.door(grpc)?, self.door(http)?));
        }
        let loms = doors[1].0.to_string();
        let products = self.products.address().to_string();
        let kafka = json!({"brokers": self.broker.brokers(), "kafka": self.broker.section()});
        let of_checkout = json!({
            "token": products::TOKEN,
            "services": {"loms": loms, "products": products},
            "products": {"tls": true, "ca": certs::ca(&self.certs)},
        });
        let mut of_loms = kafka.clone();
        of_loms["orders"] = json!({"payment_timeout": options.payment_timeout});
        // as in the example file: deliveries are the operator's, everything else is everybody's
        of_loms["tls"] = json!({"client_auth": "optional"});
        of_loms["roles"] = json!({certs::OPERATOR: ["operator"], "*": ["checkout", "gateway"]});
        let mut own = [of_checkout, of_loms, kafka];
        for (name, own) in SERVICES.into_iter().zip(&mut own) {
            if let Some(settings) = options.settings.get(name) {
                merge(own, settings);
            }
        }
        let wanted =
            (0..SERVICES.len()).filter(|index| options.services.contains(&SERVICES[*index]));
        let launched = wanted.map(|index| self.launch(index, doors[index], own[index].clone()));
        self.services = futures::future::try_join_all(launched).await?;
        self.wait_ready().await
    }

    fn door(&mut self, port: u16) -> Result<SocketAddr> {
        if port != 0 {
            return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        }
        let reserved = Reserved::any()?;
        let address = reserved.address();
        self.ports.push(reserved);
        Ok(address)
    }

    /// Writes a service's configuration, migrates its database, starts it.
    async fn launch(
        &self,
        index: usize,
        doors: (SocketAddr, SocketAddr),
        own: Value,
    ) -> Result<Service> {
        let name = SERVICES[index];
        let mut config = self.config(name, &self.databases[index].1, doors);
        merge(&mut config, &own);
        // a dollar in a password must not be read as the start of ${NAME}
        let text = serde_yaml::to_string(&config)?.replace('$', "$$");
        std::fs::write(self.config_file(name), text).context("write a configuration")?;
        self.command(name, &["migrate"]).await?.expect_success()?;
        let log = self.dir.path().join(format!("{name}.log"));
        Service::start(
            name,
            &self.binaries.service(name)?,
            &self.config_file(name),
            log,
        )
        .await
    }

    /// Waits until every service is ready, as after a start.
    pub async fn wait_ready(&mut self) -> Result<()> {
        for service in &mut self.services {
            service.wait_ready(READY_BOUND).await?;
        }
        Ok(())
    }

    /// What every service has.
    fn config(&self, name: &str, database: &str, doors: (SocketAddr, SocketAddr)) -> Value {
        json!({
            "grpc": {"listen": doors.0},
            "http": {"listen": doors.1},
            "tls": {
                "enabled": true,
                "ca": certs::ca(&self.certs),
                "cert": certs::cert(&self.certs, name),
                "key": certs::key(&self.certs, name),
            },
            "postgres": {"connection_string": database},
        })
    }

    fn config_file(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.yaml"))
    }

    /// Runs a command of a service against this stack, `loms audit` say.
    pub async fn command(&self, service: &str, arguments: &[&str]) -> Result<Finished> {
        service::run(
            service,
            &self.binaries.service(service)?,
            arguments,
            &self.config_file(service),
        )
        .await
    }

    /// Receives a delivery from a file of `warehouse_id,sku,count`.
    pub async fn receive_stock(&self, file: &Path) -> Result<String> {
        let file = file.to_str().context("a path that is not UTF-8")?;
        self.command("loms", &["stock", "receive", file])
            .await?
            .expect_success()
    }

    /// Receives the retail stock.
    pub async fn receive_retail_stock(&self) -> Result<String> {
        let file = self.dir.path().join("stock.csv");
        std::fs::write(&file, retail::STOCK_CSV).context("write stock.csv")?;
        self.receive_stock(&file).await
    }

    /// Callers of every door.
    pub fn clients(&self) -> Result<Clients> {
        Clients::new(self)
    }

    /// Waits until Notifications reads the events, which a consumer's first join delays by seconds. Whoever only looks
    /// at histories later need not wait; whoever looks at once would find them empty.
    pub async fn wait_for_consumer(&self) -> Result<()> {
        let http = crate::clients::http_client()?;
        let url = format!("http://{}/metrics", self.service("notifications")?.admin());
        let by = Instant::now() + READY_BOUND;
        while Instant::now() < by {
            let metrics = http.get(&url).send().await?.text().await?;
            let partitions = metrics
                .lines()
                .find_map(|line| line.strip_prefix("notifications_consumer_partitions "));
            if partitions.is_some_and(|count| count != "0") {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("notifications was assigned no partitions of the topic")
    }

    /// A service that runs.
    pub fn service(&self, name: &str) -> Result<&Service> {
        self.services
            .iter()
            .find(|service| service.name() == name)
            .with_context(|| format!("no {name}"))
    }

    /// Where ProductService's stand-in listens.
    pub fn products(&self) -> SocketAddr {
        self.products.address()
    }

    /// The URL by which a service, its owner, reaches its database.
    pub fn database(&self, service: &str) -> Result<&str> {
        Ok(&self.database_of(service)?.1)
    }

    /// The administrator's URL of a service's database: for what only a superuser may ask or change.
    pub fn admin_database(&self, service: &str) -> Result<String> {
        self.postgres.admin_url_of(&self.database_of(service)?.0)
    }

    fn database_of(&self, service: &str) -> Result<&(String, String)> {
        let index = SERVICES.iter().position(|name| *name == service);
        let database = index.and_then(|index| self.databases.get(index));
        database.with_context(|| format!("no database of {service}"))
    }

    /// The broker, with the names of its topics.
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// What can be taken away, each apart: the services, in the order of [`SERVICES`], the broker, the database.
    pub fn parts(&mut self) -> (&mut [Service], &mut Broker, &mut Server) {
        (&mut self.services, &mut self.broker, &mut self.postgres)
    }

    /// The server's URL, the broker's addresses: what a person may want to look into.
    pub fn backing(&self) -> (&str, &[String]) {
        (self.postgres.admin_url(), self.broker.brokers())
    }

    /// The folder of the certificates in use.
    pub fn certs(&self) -> &Path {
        &self.certs
    }

    /// The authority that signed the certificates in use.
    pub fn ca(&self) -> PathBuf {
        certs::ca(&self.certs)
    }

    /// The folder of the run: configurations and logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The end of each service's log, for a failure whose cause may be there.
    pub fn logs(&self) -> String {
        let log =
            |service: &Service| format!("--- {}\n{}", service.name(), service::tail(service.log()));
        self.services.iter().map(log).collect::<Vec<_>>().join("\n")
    }

    /// An error as soon as a service has ended by itself; never answers otherwise.
    pub async fn watch(&mut self) -> Result<std::convert::Infallible> {
        loop {
            self.services
                .iter_mut()
                .try_for_each(Service::check_alive)?;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Stops the callers before those they call, then what they stand on. The first error of all is answered, after
    /// everything has been stopped.
    pub async fn stop(self) -> Result<()> {
        let mut outcome = Ok(());
        for mut service in self.services {
            outcome = outcome.and(service.stop().await);
        }
        outcome = outcome.and(self.products.stop().await);
        outcome = outcome.and(self.broker.stop().await);
        outcome.and(self.postgres.stop().await)
    }
}

fn stand_in(options: &Options, certs: &Path) -> Result<products::Options> {
    Ok(products::Options {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, options.ports.of("products").0)),
        catalogue: retail::catalogue(retail::PRODUCTS_CSV)?,
        token: products::TOKEN.to_owned(),
        limits: options.limits,
        latency: Duration::ZERO,
        tls: Some((
            certs::cert(certs, "products"),
            certs::key(certs, "products"),
        )),
    })
}
