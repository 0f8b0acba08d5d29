//! What the load is put on: a stack of its own with empty databases, or any server that speaks the contract.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use proto::loms::loms_client::LomsClient;
use serde_json::Value;
use sqlx::PgConnection;
use tokio::time::Instant;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use super::skus::Skus;
use crate::{
    ports::Reserved,
    postgres::connect,
    service::Service,
    service::merge,
    stack::{Options, Stack},
};

/// Callers share so many connections, as a few gateways in front would.
const CONNECTIONS: usize = 8;
/// Units of each SKU in each of the warehouses.
const AMPLE: u32 = 100_000_000;
const SCARCE: u32 = 100;
const WAREHOUSES: i64 = 3;
/// A further process says so soon that it is ready.
const READY_BOUND: Duration = Duration::from_secs(30);
/// The system behind the load is asked for its state this often.
const POLL: Duration = Duration::from_millis(20);

/// Where a server listens that is not ours, and what verifies it; plaintext without.
#[derive(Clone, Debug)]
pub(super) struct Address {
    pub(super) grpc: String,
    pub(super) ca: Option<PathBuf>,
}

/// A server under load.
pub(super) struct Target {
    stack: Option<Stack>,
    /// How the stack was started, if it is ours.
    options: Option<Options>,
    /// Further processes of the service that is called.
    others: Vec<Service>,
    /// Theirs: one that is started again finds its own free.
    ports: Vec<Reserved>,
    tls: bool,
    /// Which run, if they are ours.
    services: &'static [&'static str],
    channels: Arc<Vec<Channel>>,
}

impl Target {
    /// Services with their databases and broker, alone on the machine with their load; the first is called, in so many
    /// processes.
    pub(super) async fn own(options: Options, replicas: usize) -> Result<Target> {
        let mut target = Target {
            tls: true,
            services: options.services,
            stack: Some(Stack::start(&options).await?),
            options: Some(options),
            others: Vec::new(),
            ports: Vec::new(),
            channels: Arc::default(),
        };
        target.grow(replicas).await?;
        Ok(target)
    }

    /// Starts processes of the service that is called until there are so many; calls go to all of them from now on.
    pub(super) async fn grow(&mut self, replicas: usize) -> Result<()> {
        let (stack, options) = self
            .stack
            .as_ref()
            .zip(self.options.as_ref())
            .context("it is not ours")?;
        for number in self.others.len() + 2..=replicas {
            let ports = [Reserved::any()?, Reserved::any()?];
            let service = start_replica(stack, options, number, &ports).await?;
            self.others.push(service);
            self.ports.extend(ports);
        }
        let called = self.others.iter().chain([stack.service(self.services[0])?]);
        let addresses = called.map(|service| Address {
            grpc: service.grpc().to_string(),
            ca: Some(stack.ca()),
        });
        self.channels = Arc::new(channels(&addresses.collect::<Vec<_>>())?);
        Ok(())
    }

    /// Starts every process of LOMS again with these changes to its configuration.
    pub(super) async fn reconfigure(&mut self, changes: &Value) -> Result<()> {
        let stack = self.stack.as_mut().context("it is not ours")?;
        let services = stack.parts().0.iter_mut();
        let loms = services.filter(|service| service.name() == "loms");
        for service in loms.chain(&mut self.others) {
            // stopped, not killed: a killed LOMS keeps its lease, and events wait until it ends
            service.stop().await?;
            configure(service.config(), |config| merge(config, changes))?;
            service.start_again().await?;
            service.wait_ready(READY_BOUND).await?;
        }
        Ok(())
    }

    /// A server that runs: its stock is what it is.
    pub(super) fn at(address: &Address) -> Result<Target> {
        Ok(Target {
            stack: None,
            options: None,
            others: Vec::new(),
            ports: Vec::new(),
            services: &[],
            tls: address.ca.is_some(),
            channels: Arc::new(channels(std::slice::from_ref(address))?),
        })
    }

    /// The caller of the given number.
    pub(super) fn loms(
        &self,
    ) -> impl Fn(usize) -> LomsClient<Channel> + Clone + Send + Sync + 'static {
        let channel = self.channel();
        move |caller| LomsClient::new(channel(caller))
    }

    /// The connection of the caller of the given number.
    pub(super) fn channel(&self) -> impl Fn(usize) -> Channel + Clone + Send + Sync + 'static {
        let channels = self.channels.clone();
        move |caller| channels[caller % channels.len()].clone()
    }

    /// Whether calls are encrypted.
    pub(super) fn tls(&self) -> bool {
        self.tls
    }

    /// The stack, if it is ours.
    pub(super) fn stack(&self) -> Option<&Stack> {
        self.stack.as_ref()
    }

    /// The same, to stop and start parts of it.
    pub(super) fn stack_mut(&mut self) -> Option<&mut Stack> {
        self.stack.as_mut()
    }

    /// LOMS, if it runs and is ours.
    fn own_loms(&self) -> Option<&Stack> {
        self.stack
            .as_ref()
            .filter(|_| self.services.contains(&"loms"))
    }

    /// Puts units of every SKU on sale, three warehouses, if the stack is ours.
    pub(super) async fn stock(&self, skus: &Skus, scarce: bool) -> Result<()> {
        let Some(stack) = self.own_loms() else {
            return Ok(());
        };
        let units = if scarce { SCARCE } else { AMPLE };
        let mut csv = "warehouse_id,sku,count\n".to_owned();
        for sku in skus.all() {
            for warehouse in 1..=WAREHOUSES {
                writeln!(csv, "{warehouse},{sku},{units}")?;
            }
        }
        let file = stack.dir().join("load.csv");
        std::fs::write(&file, csv).context("write the delivery")?;
        stack.receive_stock(&file).await?;
        Ok(())
    }

    /// The administrator's connection to the database of LOMS, if the stack is ours: to change settings of the server, and
    /// to read what statements of others cost.
    pub(super) async fn admin(&self) -> Result<Option<PgConnection>> {
        let Some(stack) = self.own_loms() else {
            return Ok(None);
        };
        let url = stack.admin_database("loms")?;
        Ok(Some(connect(&url).await?))
    }

    /// A connection to the database of LOMS, as LOMS has it, if the stack is ours.
    pub(super) async fn database(&self) -> Result<Option<PgConnection>> {
        let Some(stack) = self.own_loms() else {
            return Ok(None);
        };
        Ok(Some(connect(stack.database("loms")?).await?))
    }

    /// Resident memory of the service that is called, in MiB: its peak, from Linux's `VmHWM`.
    pub(super) fn peak_memory(&self) -> Option<f64> {
        let called = self.services.first()?;
        let pid = self.stack.as_ref()?.service(called).ok()?.pid()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib / 1024.0)
    }

    /// `loms audit`: its last line, and whether it found nothing.
    pub(super) async fn audit(&self) -> Result<Option<(bool, String)>> {
        let Some(stack) = self.own_loms() else {
            return Ok(None);
        };
        let audit = stack.command("loms", &["audit"]).await?;
        let last = audit.stdout.lines().last().unwrap_or_default().to_owned();
        Ok(Some((audit.status.success(), last)))
    }

    /// Stops the stack, if it is ours.
    pub(super) async fn stop(self) -> Result<()> {
        for mut service in self.others {
            service.stop().await?;
        }
        match self.stack {
            Some(stack) => stack.stop().await,
            None => Ok(()),
        }
    }
}

/// One more process of the service that is called, as the first is configured, on ports of its own.
async fn start_replica(
    stack: &Stack,
    options: &Options,
    number: usize,
    ports: &[Reserved; 2],
) -> Result<Service> {
    let name = options.services[0];
    let file = stack.dir().join(format!("{name}-{number}.yaml"));
    std::fs::copy(stack.dir().join(format!("{name}.yaml")), &file)
        .context("copy a configuration")?;
    configure(&file, |config| {
        for (door, port) in ["grpc", "http"].into_iter().zip(ports) {
            config[door]["listen"] = port.address().to_string().into();
        }
    })?;
    let log = stack.dir().join(format!("{name}-{number}.log"));
    let executable = options.binaries.service(name)?;
    let mut service = Service::start(name, &executable, &file, log).await?;
    service.wait_ready(READY_BOUND).await?;
    Ok(service)
}

/// Changes a configuration file.
fn configure(file: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut config: Value = serde_yaml::from_str(&std::fs::read_to_string(file)?)?;
    change(&mut config);
    std::fs::write(file, serde_yaml::to_string(&config)?).context("write a configuration")
}

/// Waits until the statement counts nothing, and says how long that took; `None` when it never came to it.
pub(super) async fn until_none(
    db: &mut PgConnection,
    count: &'static str,
    bound: Duration,
) -> Result<Option<f64>> {
    let since = Instant::now();
    while since.elapsed() < bound {
        let left: i64 = sqlx::query_scalar(count).fetch_one(&mut *db).await?;
        if left == 0 {
            return Ok(Some(since.elapsed().as_secs_f64()));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(None)
}

/// Connections to each in turn.
fn channels(addresses: &[Address]) -> Result<Vec<Channel>> {
    let endpoints = addresses.iter().map(endpoint);
    let endpoints = endpoints.collect::<Result<Vec<_>>>()?;
    let connections = endpoints.iter().cycle().take(CONNECTIONS);
    Ok(connections.map(Endpoint::connect_lazy).collect())
}

fn endpoint(address: &Address) -> Result<Endpoint> {
    let scheme = if address.ca.is_some() {
        "https"
    } else {
        "http"
    };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", address.grpc))?
        .timeout(Duration::from_secs(30))
        .tcp_nodelay(true);
    if let Some(ca) = &address.ca {
        let pem = std::fs::read(ca).with_context(|| format!("read {}", ca.display()))?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
        endpoint = endpoint.tls_config(tls)?;
    }
    Ok(endpoint)
}
