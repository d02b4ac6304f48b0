use dmlocal_model::{
    admit::{self, Admitted},
    volume::{Borrower, Failure, Lent, Relay},
};

use super::*;

fn grant() -> v1::Grant {
    let uuid = |last: u8| format!("11111111-2222-4333-8444-5555555555{last:02x}");
    v1::Grant {
        depth: 1,
        source: None,
        begins: false,
        id: uuid(1),
        volume_id: uuid(2),
        incarnation: uuid(3),
        generation: 1,
        size_bytes: 1 << 20,
        logical_block_size: 512,
        source_node: "a".into(),
        source_endpoint: "https://a:7450".into(),
        node: "b".into(),
        hold: true,
        address: "192.0.2.1".into(),
        port: 4420,
        subsystem_nqn: format!("{NQN_PREFIX}{}", uuid(6)),
        namespace_uuid: uuid(4),
        namespace_nguid: uuid(5),
        api_version: API_VERSION,
        oldest_api_version: OLDEST_API_VERSION,
    }
}

fn reason(grant: v1::Grant) -> String {
    match offer(grant, "b").unwrap_err() {
        ServiceError::Refused(refusal) => refusal.reason().to_owned(),
        ServiceError::Argument { field, .. } => field.to_owned(),
        error => error.to_string(),
    }
}

#[test]
fn a_peer_one_version_ahead_is_accepted_and_one_too_new_is_not() {
    let ahead = v1::Grant { api_version: API_VERSION + 1, ..grant() };
    assert!(offer(ahead, "b").is_ok());
    let too_new =
        v1::Grant { api_version: API_VERSION + 2, oldest_api_version: API_VERSION + 1, ..grant() };
    assert_eq!(reason(too_new), "PEER_VERSION");
    let too_old = v1::Grant { api_version: 0, oldest_api_version: 0, ..grant() };
    assert_eq!(reason(too_old), "PEER_VERSION");
}

#[test]
fn a_grant_for_another_node_is_not_a_grant() {
    assert_eq!(reason(v1::Grant { node: "c".into(), ..grant() }), "GRANT_UNKNOWN");
}

/// A volume that is received under `grant`, not yet taken.
fn received() -> View {
    let offer = offer(grant(), "b").unwrap();
    let admitted = admit::receive_remote(None, None, offer, false, None, "b", None).unwrap();
    let Admitted::Journal(record) = admitted else { panic!("{admitted:?}") };
    let detail = String::new();
    View { record: *record, seen: None, detail, rate: None, stalled_since: None }
}

#[test]
fn a_volume_that_fails_while_it_is_held_is_not_taken_for_one_that_was_handed_over() {
    let mut view = received();
    let failure = Failure { why: "gone".into(), boot: Uuid::from_u128(1) };
    for (stage, is_held) in [(ReceivingStage::Held, true), (ReceivingStage::Hydrating, false)] {
        let Phase::Receiving(receiving) = &mut view.record.phase else { panic!() };
        (receiving.stage, receiving.failure) = (stage, Some(failure.clone()));
        let shown = volume(&view);
        assert_eq!(shown.state(), v1::VolumeState::Failed);
        assert_eq!(shown.held_writes.is_some(), is_held, "{stage:?}");
    }
}

#[test]
fn a_volume_that_goes_on_before_it_has_arrived_shows_the_grant_by_which_it_goes() {
    let mut view = received();
    let mut receiving = view.record.receiving().unwrap().clone();
    receiving.stage = ReceivingStage::Hydrating;
    let onward = Uuid::from_u128(9);
    let lent = |stage| Lent {
        to: Borrower { grant: onward, node: "c".into(), endpoint: "https://c:7450".into() },
        host_nqn: String::new(),
        hold: true,
        export: receiving.source.export.clone(),
        stage,
        session: 0,
        served_in: None,
    };
    for (stage, state) in [
        (LentStage::Published, v1::VolumeState::Hydrating),
        (LentStage::Fenced, v1::VolumeState::Fenced),
    ] {
        let relay = Relay { receiving: receiving.clone(), lent: lent(stage) };
        view.record.phase = Phase::Relaying(Box::new(relay));
        let shown = volume(&view);
        assert_eq!((shown.state(), shown.peer_node()), (state, "c"));
        assert_eq!(shown.grant_id(), onward.to_string());
    }
}

#[test]
fn what_could_become_another_option_of_the_connection_is_refused() {
    let field = |change: fn(&mut v1::Grant)| {
        let mut changed = grant();
        change(&mut changed);
        reason(changed)
    };
    assert_eq!(field(|g| g.subsystem_nqn = "nqn,traddr=192.0.2.9".into()), "grant.subsystem_nqn");
    // What is disconnected by it must be an import of ours.
    let foreign = |g: &mut v1::Grant| g.subsystem_nqn = "nqn.2020-01.com.example:disk".into();
    assert_eq!(field(foreign), "grant.subsystem_nqn");
    assert_eq!(field(|g| g.address = "node-a".into()), "grant.address");
    assert_eq!(field(|g| g.port = 70000), "grant.port");
    assert_eq!(field(|g| g.port = 0), "grant.port");
    assert_eq!(field(|g| g.source_endpoint = "http://a".into()), "grant.source_endpoint");
    assert_eq!(field(|g| g.generation = 0), "grant.generation");
    assert_eq!(field(|g| g.namespace_uuid = "x".into()), "grant.namespace_uuid");
}
