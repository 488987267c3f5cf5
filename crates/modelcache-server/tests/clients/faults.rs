//! Downloads over a bad network, and from a Hub whose files are wrong.

use crate::harness::{House, MIB, Machine, clients, error_class, is_error};
use modelcache_testkit::hub::HubFault;
use modelcache_testkit::proxy::ProxyFault;
use modelcache_testkit::{Content, FaultProxy};
use serde_json::{Value, json};
use std::time::Duration;

const BIG: &str = "model.safetensors";
const SIZE: u64 = 24 * MIB;

/// A daemon in front of a repository with one large file.
fn house() -> (House, Value) {
    let house = House::new();
    let content = Content::generated(7, SIZE);
    let sum = json!(content.sha256().unwrap());
    house.hub.repo("org/model").commit().file(BIG, content).publish().unwrap();
    (house, sum)
}

fn download() -> Value {
    json!(["hf_hub_download", { "repo_id": "org/model", "filename": BIG }])
}

fn forced_download() -> Value {
    json!(["hf_hub_download", { "repo_id": "org/model", "filename": BIG, "force_download": true }])
}

#[test]
fn a_download_that_the_hub_cuts_at_15_mib_is_completed_for_the_client() {
    for client in clients() {
        let (house, sum) = house();
        let cut = house.hub.faults().add(HubFault::cut(15 * MIB).on("/resolve/").once());
        let outcome = &house.machine(&client).run(json!([download()]))[0];
        assert_eq!(outcome["value"]["files"][""], sum, "{client:?}: {outcome:#}");
        // The daemon may have asked for smaller ranges.
        assert!(cut.count() <= 1);
        assert!(house.hub.body_bytes() < SIZE + 16 * MIB, "{client:?}");
    }
}

#[test]
fn a_download_that_the_network_cuts_at_15_mib_is_resumed_by_the_client() {
    for client in clients() {
        let (house, sum) = house();
        let network = FaultProxy::start_on(&house.url, 0).unwrap();
        let cut = network.faults().add(ProxyFault::cut(15 * MIB).once());
        let machine = Machine::new(&client, &network.url());
        let outcomes = machine.run(json!([download(), download()]));
        if client.is_old() {
            // This version gives up when a connection ends early. The next call resumes.
            assert!(is_error(&outcomes[0], "ChunkedEncodingError"), "{client:?}: {:#}", outcomes[0]);
        } else {
            assert_eq!(outcomes[0]["value"]["files"][""], sum, "{client:?}: {:#}", outcomes[0]);
        }
        assert_eq!(outcomes[1]["value"]["files"][""], sum, "{client:?}: {:#}", outcomes[1]);
        assert_eq!(cut.count(), 1);
        // The daemon may begin again, because for a moment it has no client.
        assert!(house.hub.body_bytes() <= 2 * SIZE, "{client:?}");
        // The client kept its first 10 MiB.
        assert!(network.bytes_down() < SIZE + 6 * MIB, "{client:?}: {}", network.bytes_down());
    }
}

#[test]
fn a_client_never_ends_with_the_bytes_of_a_corrupt_response() {
    for client in clients() {
        let (house, sum) = house();
        let flip = house.hub.faults().add(HubFault::flip(5 * MIB).on("/resolve/").once());
        // The client gets wrong bytes while the rest of the file is on its way.
        let stall = HubFault::stall_at(22 * MIB, Duration::from_secs(2));
        house.hub.faults().add(stall.on("/resolve/").once());
        let machine = house.machine(&client);
        let outcomes = machine.run(json!([download(), download(), forced_download()]));
        assert_eq!(flip.count(), 1, "{client:?}");
        for outcome in outcomes.iter().filter(|outcome| error_class(outcome).is_none()) {
            assert_eq!(outcome["value"]["files"][""], sum, "{client:?}");
        }
        if client.is_old() {
            // This version keeps the wrong bytes for the next call. It is told how to get rid of them.
            assert!(is_error(&outcomes[0], "ChunkedEncodingError"), "{client:?}: {:#}", outcomes[0]);
            assert!(is_error(&outcomes[1], "HfHubHTTPError"), "{client:?}: {outcomes:#?}");
            let text = outcomes[1]["text"].as_str().unwrap();
            assert!(text.contains("--force-download"), "{client:?}: {text}");
        } else {
            assert_eq!(error_class(&outcomes[0]), None, "{client:?}: {:#}", outcomes[0]);
        }
        assert_eq!(error_class(&outcomes[2]), None, "{client:?}: {:#}", outcomes[2]);
    }
}

#[test]
fn a_client_is_told_if_the_hub_has_only_corrupt_bytes() {
    for client in clients() {
        let (house, _) = house();
        house.hub.faults().add(HubFault::flip(13 * MIB).on("/resolve/"));
        let machine = house.machine(&client);
        let outcomes = machine.run(json!([download(), forced_download()]));
        for outcome in &outcomes {
            assert!(error_class(outcome).is_some(), "{client:?}: {outcome:#}");
        }
        if !client.is_old() {
            let text = outcomes[0]["text"].as_str().unwrap();
            assert!(text.contains("502"), "{client:?}: {text}");
        }
        // The first download, and a few retries of client and daemon.
        assert!(house.hub.body_bytes() < 10 * SIZE, "{client:?}: {}", house.hub.body_bytes());
    }
}

#[test]
fn a_pause_that_the_hub_asks_for_reaches_the_client() {
    for client in clients().into_iter().filter(|client| !client.is_old()) {
        let (house, sum) = house();
        house.hub.faults().add(HubFault::throttle(3).once());
        let outcome = &house.machine(&client).run(json!([download()]))[0];
        assert_eq!(outcome["value"]["files"][""], sum, "{client:?}: {outcome:#}");
    }
}

#[test]
fn a_client_outlasts_a_hub_that_stalls_for_9_seconds() {
    let Some(client) = clients().pop() else { return };
    let (house, sum) = house();
    house.hub.faults().add(HubFault::stall_at(13 * MIB, Duration::from_secs(9)).on("/resolve/").once());
    let outcome = &house.machine(&client).run(json!([download()]))[0];
    assert_eq!(outcome["value"]["files"][""], sum, "{client:?}: {outcome:#}");
}
