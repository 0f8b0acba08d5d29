//! A TCP proxy that can be cut, or go silent: the database behind it is then away, and later back.

use std::net::{Ipv4Addr, SocketAddr};

use sqlx::{ConnectOptions as _, PgPool};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::watch,
    task::JoinSet,
};

pub(crate) struct Proxy {
    address: SocketAddr,
    target: String,
    /// Bound and not listening: the port is ours, and whoever connects is refused.
    closed: Option<TcpSocket>,
    running: JoinSet<()>,
    /// How often it went silent.
    silenced: watch::Sender<u32>,
}

impl Proxy {
    /// In front of the server of `pool`, open.
    pub(crate) fn before(pool: &PgPool) -> Proxy {
        let options = pool.connect_options();
        let socket = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let mut proxy = Proxy {
            address: socket.local_addr().expect("an address"),
            target: format!("{}:{}", options.get_host(), options.get_port()),
            closed: Some(socket),
            running: JoinSet::new(),
            silenced: watch::Sender::new(0),
        };
        proxy.open();
        proxy
    }

    /// The connection string that leads through it.
    pub(crate) fn url(&self, pool: &PgPool) -> String {
        let options = pool.connect_options().as_ref().clone();
        let through = options.host("127.0.0.1").port(self.address.port());
        through.to_url_lossy().to_string()
    }

    pub(crate) fn open(&mut self) {
        let socket = self.closed.take().expect("a closed proxy");
        let listener = socket.listen(64).expect("a listener");
        let (target, silenced) = (self.target.clone(), self.silenced.subscribe());
        self.running.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut silenced) = (target.clone(), silenced.clone());
                connections.spawn(async move {
                    let before = *silenced.borrow();
                    let Ok(mut far) = TcpStream::connect(target).await else {
                        return;
                    };
                    tokio::select! {
                        // an end that breaks off ends the connection, as it would without a proxy
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = async { silenced.wait_for(|now| *now > before).await.is_ok() } => std::future::pending().await,
                    }
                });
            }
        });
    }

    /// Lets every connection that there is hang: open, and nothing comes through. New ones are served.
    pub(crate) fn silence(&self) {
        self.silenced.send_modify(|times| *times += 1);
    }

    /// Ends every connection and refuses new ones.
    pub(crate) async fn cut(&mut self) {
        self.running.shutdown().await;
        self.closed = Some(bind(self.address));
    }
}

fn bind(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("an option");
    socket.bind(address).expect("a port");
    socket
}
