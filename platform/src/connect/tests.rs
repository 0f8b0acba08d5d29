//! What is shown to an upstream and trusted of it follows the files.

use std::pin::pin;

use futures::future::{Either, select};
use tokio::net::TcpListener;

use super::*;
use crate::{
    certificates::PemFile,
    config::{ClientAuth, TlsConfig},
    test_authority::{Authority, Folder, GOOD},
    tls::{Acceptor, Listener, Protocol, ServerTls},
};

fn files(folder: &Folder) -> Files {
    let file = |name| PemFile {
        setting: "tls",
        path: folder.path(name),
    };
    Files {
        identity: Some((file("cert.pem"), file("key.pem"))),
        ca: Some(file("ca.pem")),
    }
}

fn upstream(address: String) -> Neighbour {
    Neighbour {
        name: "next",
        address,
        tls: None,
        reload_every: Duration::from_secs(1),
        connect_timeout: Duration::from_secs(30),
        timeout: Duration::from_secs(30),
    }
}

#[tokio::test]
async fn a_connection_shows_and_trusts_what_is_in_the_files_now() {
    let (old, new) = (Authority::new(GOOD), Authority::new(GOOD));
    let served = Folder::of(&old, &old.sign("served", GOOD));
    let config = TlsConfig {
        cert: Some(served.path("cert.pem")),
        key: Some(served.path("key.pem")),
        ca: served.path("ca.pem"),
        client_auth: ClientAuth::Required,
        ..TlsConfig::default()
    };
    let acceptor = Acceptor {
        tls: ServerTls::load("upstream", &config).unwrap(),
        protocol: Protocol::Grpc,
        bound: Duration::from_secs(30),
    };
    let server = acceptor.tls.clone();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let mut listener = Listener::unbounded(socket, Some(acceptor));

    let caller = Folder::of(&old, &old.sign("desk", GOOD));
    let tls = ClientTls::load("caller", files(&caller), "127.0.0.1").unwrap();
    let mut connect = Connect::new(&upstream(address.clone()), Some(tls.clone()));
    let mut meet = async || {
        let connecting = connect.call(format!("http://{address}").parse().unwrap());
        // either side may be done first
        let connection = match select(pin!(listener.next()), connecting).await {
            Either::Left((connection, connecting)) => connecting.await.map(|_| connection),
            Either::Right((connected, next)) => match connected {
                Ok(_open) => Ok(next.await),
                Err(error) => Err(error),
            },
        };
        connection.ok()?.peer().names().first().cloned()
    };
    assert_eq!(meet().await.as_deref(), Some("desk"));
    caller.show(&old.sign("till", GOOD));
    tls.watched.look();
    assert_eq!(meet().await.as_deref(), Some("till"));

    served.show(&new.sign("served", GOOD));
    server.look();
    assert_eq!(meet().await, None);
    caller.write("ca.pem", &format!("{}{}", old.pem(), new.pem()));
    tls.watched.look();
    assert_eq!(meet().await.as_deref(), Some("till"));
}

#[test]
fn a_host_is_a_name_or_an_address() {
    let authority = Authority::new(GOOD);
    let folder = Folder::of(&authority, &authority.sign("desk", GOOD));
    for host in ["loms", "loms.shop.svc", "10.0.0.1", "[::1]"] {
        assert!(
            ClientTls::load("hosts", files(&folder), host).is_ok(),
            "{host}"
        );
    }
    let Err(error) = ClientTls::load("hosts", files(&folder), "under_score!") else {
        panic!("a name")
    };
    assert!(error.to_string().contains("under_score!"), "{error}");
}
