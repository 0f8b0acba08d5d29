//! ProductService: names and prices. However many ask, one request a SKU is on its way, all of them within what
//! ProductService allows, callers served in turn, answers kept for a while.
//!
//! A SKU that is asked for and not cached is a flight. All who need it wait for it, each in the line for a slot on its
//! behalf; whose slot comes first launches it, the others wait on in their places for what else they need. A launched
//! flight is a task of its own: it lands in the cache even when all who waited have gone.

use std::{sync::Arc, time::Duration};

use moka::future::Cache;
use platform::{client::Client, grpc::Deadline, tasks::Tasks};
use proto::product::{GetProductRequest, product_service_client::ProductServiceClient};
use secrecy::{ExposeSecret as _, SecretString};
use tonic::{Code, Status};

use super::{
    allowance::{Allowance, Slot},
    flights::{Flight, Flights, State},
    retry, state,
    turn::Turn,
};
use crate::{cart::Sku, config::ProductsConfig, error::Error, metrics::METRICS};

const NAME: &str = "products";
/// A request that was given up may be noticed there a little later; until then it counts as one at once.
const RESET_GRACE: Duration = Duration::from_millis(100);

/// What ProductService's limit is over; what it refused within one may pass in the next.
const WINDOW: Duration = Duration::from_secs(1);

/// What ProductService knows about a SKU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// Its name.
    pub name: String,
    /// For one unit, in the smallest unit of the currency.
    pub price: u32,
}

/// The client; clones share connection, allowance and cache.
#[derive(Clone)]
pub struct Products(Arc<Inner>);

struct Inner {
    client: Client,
    token: SecretString,
    allowance: Allowance,
    /// `None` when the config turned it off.
    cache: Option<Cache<Sku, Arc<Product>>>,
    flights: Flights<Answer>,
    tasks: Tasks,
    lookup_timeout: Duration,
}

type Answer = Result<Arc<Product>, Missed>;

/// Why there is no product; told to all who waited for the flight.
#[derive(Clone)]
enum Missed {
    Unknown,
    Away(String),
    Late,
    Broken(String),
}

impl Products {
    /// Requests go over `client` with `token`; `tasks` carries the flights.
    pub fn new(client: Client, token: SecretString, config: &ProductsConfig, tasks: Tasks) -> Self {
        let cache = (!config.cache_ttl.is_zero()).then(|| {
            Cache::builder()
                .max_capacity(config.cache_entries)
                .time_to_live(config.cache_ttl)
                .build()
        });
        Self(Arc::new(Inner {
            client,
            token,
            allowance: Allowance::new(config.per_second, config.at_once, config.arrival_margin),
            cache,
            flights: Flights::default(),
            tasks,
            lookup_timeout: config.lookup_timeout,
        }))
    }

    /// Name and price of a SKU. Pass the same `turn` for all SKUs of one call.
    ///
    /// # Errors
    /// ProductService does not know the SKU, is away or late, or there was no slot before the deadline.
    pub async fn get(
        &self,
        sku: Sku,
        turn: &Turn,
        deadline: Deadline,
    ) -> Result<Arc<Product>, Error> {
        if let Some(product) = self.0.cached(sku).await {
            METRICS.product_cache("hit");
            return Ok(product);
        }
        let flight = self.0.flights.join(sku);
        let flown = self.fly(sku, &flight, turn);
        let answer = tokio::time::timeout_at(deadline.instant(), flown).await;
        // who has no time for another try hears why the last one failed
        let answer = answer.unwrap_or_else(|_| flight.known().unwrap_or(Err(Missed::Late)));
        answer.map_err(|missed| match missed {
            Missed::Unknown => Error::UnknownProducts { skus: vec![sku] },
            Missed::Away(cause) => Error::NeighbourAway {
                neighbour: NAME,
                cause,
            },
            Missed::Broken(cause) => Error::NeighbourBroken {
                neighbour: NAME,
                cause,
            },
            Missed::Late => Error::Late { waited_for: NAME },
        })
    }

    async fn fly(&self, sku: Sku, flight: &Arc<Flight<Answer>>, turn: &Turn) -> Answer {
        let mut state = flight.subscribe();
        let took_off = state.wait_for(|state| !matches!(state, State::Waiting));
        let launch = |slot| self.launch(sku, flight, slot);
        let own = METRICS.product_wait(turn.spend(&self.0.allowance, launch));
        let own = tokio::select! {
            biased;
            _ = took_off => false,
            own = own => own,
        };
        METRICS.product_cache(if own { "miss" } else { "shared" });
        let landed = state
            .wait_for(|state| matches!(state, State::Landed(_)))
            .await;
        match landed.as_deref() {
            Ok(State::Landed(answer)) => answer.clone(),
            _ => Err(Missed::Broken("the flight was lost".to_owned())),
        }
    }

    /// Starts the request, unless another caller's slot came at the same time: then this one is not needed.
    fn launch(&self, sku: Sku, flight: &Arc<Flight<Answer>>, slot: Slot) -> Option<Slot> {
        if !flight.launch() {
            return Some(slot);
        }
        let mut landing = Landing {
            inner: self.0.clone(),
            flight: flight.clone(),
            answer: Err(Missed::Broken("the flight was lost".to_owned())),
        };
        self.0.tasks.detach(async move {
            let looked_up = landing.inner.look_up(sku, slot, &landing.flight).await;
            landing.answer = looked_up.map(Arc::new);
            if let (Ok(product), Some(cache)) = (&landing.answer, &landing.inner.cache) {
                cache.insert(sku, product.clone()).await;
            }
        });
        None
    }
}

/// The end of a flight, also of one that panics: nobody waits for it in vain.
struct Landing {
    inner: Arc<Inner>,
    flight: Arc<Flight<Answer>>,
    answer: Answer,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.flight.land(self.answer.clone());
    }
}

impl Inner {
    async fn cached(&self, sku: Sku) -> Option<Arc<Product>> {
        match &self.cache {
            Some(cache) => cache.get(&sku).await,
            None => None,
        }
    }

    /// Asks ProductService, with the slot that the flight was launched with and another one for each further try.
    async fn look_up(
        &self,
        sku: Sku,
        slot: Slot,
        flight: &Flight<Answer>,
    ) -> Result<Product, Missed> {
        let deadline = Deadline::after(self.lookup_timeout);
        let again = |status: &Status| match status.code() {
            Code::Unavailable => Some(Duration::ZERO),
            Code::ResourceExhausted => Some(WINDOW),
            _ => None,
        };
        let mut first = Some(slot);
        let tries = retry(deadline, again, |deadline| {
            let slot = first.take();
            async move {
                let slot = match slot {
                    Some(slot) => slot,
                    None => self.another_slot(deadline).await?,
                };
                let answer = self.ask(sku, slot, deadline).await;
                if let Err(status) = &answer {
                    flight.fail(Err(missed(status)));
                }
                answer
            }
        });
        tries.await.map_err(|status| missed(&status))
    }

    async fn another_slot(&self, deadline: Deadline) -> Result<Slot, Status> {
        tokio::time::timeout_at(deadline.instant(), self.allowance.acquire())
            .await
            .map_err(|_| Status::deadline_exceeded("no slot for another try"))
    }

    async fn ask(&self, sku: Sku, mut slot: Slot, deadline: Deadline) -> Result<Product, Status> {
        let message = GetProductRequest {
            token: self.token.expose_secret().to_owned(),
            sku: sku.get(),
        };
        let mut stub = ProductServiceClient::new(self.client.clone());
        slot.send();
        let request = self.client.request(deadline, message);
        let answer = self.client.call(deadline, stub.get_product(request)).await;
        match &answer {
            Ok(_) => {
                slot.answered();
                state(NAME).works();
            }
            Err(status) if status.code() == Code::DeadlineExceeded => {
                tokio::time::sleep(RESET_GRACE).await;
            }
            // may be our own transport, so it says nothing about the connection
            Err(status)
                if matches!(
                    status.code(),
                    Code::Unavailable | Code::Unknown | Code::Cancelled
                ) => {}
            _ => slot.answered(),
        }
        answer.map(|product| Product {
            name: product.name,
            price: product.price,
        })
    }
}

fn missed(status: &Status) -> Missed {
    let cause = || format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        Code::NotFound => Missed::Unknown,
        Code::DeadlineExceeded => Missed::Late,
        // RESOURCE_EXHAUSTED: it is we who asked too much of it, not our caller of us
        Code::ResourceExhausted | Code::Unavailable | Code::Unknown | Code::Cancelled => {
            Missed::Away(cause())
        }
        _ => Missed::Broken(cause()),
    }
}
