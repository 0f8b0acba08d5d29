//! A stand-in for ProductService, the outside party: the same contract, a catalogue from a file, and its manners: a token
//! in each request, 10 requests in any second, 5 at once, and RESOURCE_EXHAUSTED at once for what is over.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    ops::Bound,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use proto::product::{
    GetProductRequest, GetProductResponse, ListSkusRequest, ListSkusResponse,
    product_service_server::{ProductService, ProductServiceServer},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, SemaphorePermit},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

use crate::{failure::Misuse, retail::Product};

/// The token that services use unless they are told another.
pub const TOKEN: &str = "testtoken";

/// What the outside party allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests in any second.
    pub per_second: usize,
    /// Requests at the same time.
    pub at_once: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            per_second: 10,
            at_once: 5,
        }
    }
}

/// How to run a stand-in.
pub struct Options {
    pub listen: SocketAddr,
    pub catalogue: BTreeMap<u32, Product>,
    pub token: String,
    pub limits: Limits,
    /// How long it takes to answer.
    pub latency: Duration,
    /// Certificate and key; plaintext without.
    pub tls: Option<(PathBuf, PathBuf)>,
}

/// A stand-in that serves until it is stopped or dropped.
pub struct StandIn {
    address: SocketAddr,
    stop: CancellationToken,
    serving: JoinSet<Result<(), tonic::transport::Error>>,
}

impl StandIn {
    /// Opens the port and serves.
    pub async fn start(options: Options) -> Result<StandIn> {
        let mut server = Server::builder();
        if let Some((cert, key)) = &options.tls {
            let read = |file: &PathBuf| {
                std::fs::read(file).map_err(|error| {
                    Misuse::error(
                        format!("reading {}: {error}", file.display()),
                        "run `make certs`",
                    )
                })
            };
            let identity = Identity::from_pem(read(cert)?, read(key)?);
            server = server
                .tls_config(ServerTlsConfig::new().identity(identity))
                .context("load the certificate")?;
        }
        let listener = TcpListener::bind(options.listen).await.map_err(|error| {
            let what = format!("opening {} for ProductService: {error}", options.listen);
            Misuse::error(what, "stop what uses the port")
        })?;
        let address = listener.local_addr()?;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .with_service_name("route256.product.ProductService")
            .build_v1()?;
        let stop = CancellationToken::new();
        let router = server
            .add_service(ProductServiceServer::new(Catalogue::new(options)))
            .add_service(reflection);
        let stopped = stop.clone().cancelled_owned();
        let mut serving = JoinSet::new();
        serving.spawn(router.serve_with_incoming_shutdown(TcpIncoming::from(listener), stopped));
        Ok(StandIn {
            address,
            stop,
            serving,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting, finishes what runs. Callers that keep a connection open are not waited for.
    pub async fn stop(mut self) -> Result<()> {
        self.stop.cancel();
        match tokio::time::timeout(Duration::from_secs(2), self.serving.join_next()).await {
            Ok(Some(served)) => Ok(served??),
            Ok(None) | Err(_) => Ok(()),
        }
    }
}

struct Catalogue {
    products: BTreeMap<u32, Product>,
    token: String,
    latency: Duration,
    gate: Gate,
}

impl Catalogue {
    fn new(options: Options) -> Catalogue {
        let Options {
            catalogue,
            token,
            latency,
            limits,
            ..
        } = options;
        Catalogue {
            products: catalogue,
            token,
            latency,
            gate: Gate::new(limits),
        }
    }

    async fn admit(&self, token: &str) -> Result<SemaphorePermit<'_>, Status> {
        let permit = self
            .gate
            .admit(Instant::now())
            .map_err(Status::resource_exhausted)?;
        if token != self.token {
            return Err(Status::unauthenticated("wrong token"));
        }
        tokio::time::sleep(self.latency).await;
        Ok(permit)
    }
}

#[tonic::async_trait]
impl ProductService for Catalogue {
    async fn get_product(
        &self,
        request: Request<GetProductRequest>,
    ) -> Result<Response<GetProductResponse>, Status> {
        let request = request.into_inner();
        let _permit = self.admit(&request.token).await?;
        let product = self
            .products
            .get(&request.sku)
            .ok_or_else(|| Status::not_found("no such SKU"))?;
        Ok(Response::new(GetProductResponse {
            name: product.name.clone(),
            price: product.price,
        }))
    }

    async fn list_skus(
        &self,
        request: Request<ListSkusRequest>,
    ) -> Result<Response<ListSkusResponse>, Status> {
        let request = request.into_inner();
        let _permit = self.admit(&request.token).await?;
        let after = (Bound::Excluded(request.start_after_sku), Bound::Unbounded);
        let count = usize::try_from(request.count).unwrap_or(usize::MAX);
        let skus = self
            .products
            .range(after)
            .map(|(sku, _)| *sku)
            .take(count)
            .collect();
        Ok(Response::new(ListSkusResponse { skus }))
    }
}

/// Counts the requests let in during the second before now, and those inside. A bucket that refills would let twice as
/// many through in its first second.
struct Gate {
    limits: Limits,
    admitted: Mutex<VecDeque<Instant>>,
    inside: Arc<Semaphore>,
}

impl Gate {
    fn new(limits: Limits) -> Gate {
        Gate {
            limits,
            admitted: Mutex::default(),
            inside: Arc::new(Semaphore::new(limits.at_once)),
        }
    }

    fn admit(&self, now: Instant) -> Result<SemaphorePermit<'_>, &'static str> {
        let permit = self
            .inside
            .try_acquire()
            .map_err(|_| "too many requests at once")?;
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        while admitted
            .front()
            .is_some_and(|at| now.duration_since(*at) >= Duration::from_secs(1))
        {
            admitted.pop_front();
        }
        if admitted.len() >= self.limits.per_second {
            return Err("too many requests in a second");
        }
        admitted.push_back(now);
        Ok(permit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_second_has_more_than_ten() {
        let gate = Gate::new(Limits::default());
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert!((0..10).all(|i| gate.admit(at(i * 50)).is_ok()));
        assert!(gate.admit(at(999)).is_err());
        assert!(gate.admit(at(1000)).is_ok(), "the first is a second old");
        assert!(gate.admit(at(1001)).is_err(), "the second is not");
    }

    #[test]
    fn five_are_inside_and_a_sixth_is_not() {
        let gate = Gate::new(Limits::default());
        let now = Instant::now();
        let mut inside: Vec<_> = (0..5).map(|_| gate.admit(now).unwrap()).collect();
        assert!(gate.admit(now).is_err());
        inside.pop();
        assert!(gate.admit(now).is_ok());
    }
}
