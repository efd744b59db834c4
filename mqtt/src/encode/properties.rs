//! The properties of each packet, in the order in which they are written.

use bytestring::ByteString;

use super::sink::{PropertySet, Sink};
use super::{EncodeError, REMAINING_LENGTH_MAX};
use crate::property as id;
use crate::{
    Auth, ConnAckProperties, ConnectProperties, DisconnectProperties, PublishProperties, QoS,
    ReasonProperties, UserProperties, Will,
};

/// The properties of a PUBLISH as they go to one receiver.
pub(crate) struct PublishPropertySet<'a> {
    pub(crate) properties: Option<&'a PublishProperties>,
    pub(crate) subscription_ids: &'a [u32],
    pub(crate) topic_alias: Option<u16>,
}

impl<'a> PublishPropertySet<'a> {
    /// All that `properties` says.
    pub(crate) fn of(properties: Option<&'a PublishProperties>) -> Self {
        Self {
            properties,
            subscription_ids: properties.map_or(&[], |p| &p.subscription_ids),
            topic_alias: properties.and_then(|p| p.topic_alias).map(Into::into),
        }
    }
}

impl PropertySet for PublishPropertySet<'_> {
    /// The message expiry interval stands first: the fan-out patches it where it stands.
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        if let Some(properties) = self.properties {
            write_message(properties, to)?;
        }
        u16_property(id::TOPIC_ALIAS, self.topic_alias, to);
        for subscription_id in self.subscription_ids {
            write_subscription_id(*subscription_id, to)?;
        }
        Ok(())
    }
}

/// What a PUBLISH and a will have in common.
fn write_message<S: Sink>(properties: &PublishProperties, to: &mut S) -> Result<(), EncodeError> {
    u32_property(
        id::MESSAGE_EXPIRY_INTERVAL,
        properties.message_expiry_interval_s,
        to,
    );
    bool_property(id::PAYLOAD_FORMAT_INDICATOR, properties.payload_is_utf8, to);
    text_property(
        id::RESPONSE_TOPIC,
        "the response topic",
        properties
            .response_topic
            .as_ref()
            .map(|topic| topic.as_byte_string()),
        to,
    )?;
    if let Some(data) = &properties.correlation_data {
        to.u8(id::CORRELATION_DATA);
        to.binary("the correlation data", data)?;
    }
    text_property(
        id::CONTENT_TYPE,
        "the content type",
        properties.content_type.as_ref(),
        to,
    )?;
    properties.user_properties.write(to)
}

fn write_subscription_id<S: Sink>(value: u32, to: &mut S) -> Result<(), EncodeError> {
    if value == 0 || value as usize > REMAINING_LENGTH_MAX {
        return Err(EncodeError::SubscriptionId);
    }
    to.u8(id::SUBSCRIPTION_IDENTIFIER);
    to.varint(value as usize)
}

pub(crate) struct WillPropertySet<'a>(pub(crate) &'a Will);

impl PropertySet for WillPropertySet<'_> {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        if self.0.delay_interval_s > 0 {
            u32_property(id::WILL_DELAY_INTERVAL, Some(self.0.delay_interval_s), to);
        }
        match &self.0.properties {
            Some(properties) => write_message(properties, to),
            None => Ok(()),
        }
    }
}

impl PropertySet for ConnectProperties {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        u32_property(
            id::SESSION_EXPIRY_INTERVAL,
            self.session_expiry_interval_s,
            to,
        );
        u16_property(
            id::RECEIVE_MAXIMUM,
            self.receive_maximum.map(Into::into),
            to,
        );
        u32_property(id::MAXIMUM_PACKET_SIZE, self.maximum_packet_size, to);
        u16_property(id::TOPIC_ALIAS_MAXIMUM, self.topic_alias_maximum, to);
        bool_property(
            id::REQUEST_RESPONSE_INFORMATION,
            self.request_response_information,
            to,
        );
        bool_property(
            id::REQUEST_PROBLEM_INFORMATION,
            self.request_problem_information,
            to,
        );
        self.user_properties.write(to)?;
        write_authentication(
            self.authentication_method.as_ref(),
            self.authentication_data.as_deref(),
            to,
        )
    }
}

impl PropertySet for ConnAckProperties {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        u32_property(
            id::SESSION_EXPIRY_INTERVAL,
            self.session_expiry_interval_s,
            to,
        );
        u16_property(
            id::RECEIVE_MAXIMUM,
            self.receive_maximum.map(Into::into),
            to,
        );
        // 2 is what absence means, and may not be said (section 3.2.2.3.4).
        if let Some(qos) = self.maximum_qos.filter(|qos| *qos != QoS::ExactlyOnce) {
            to.u8(id::MAXIMUM_QOS);
            to.u8(qos as u8);
        }
        bool_property(id::RETAIN_AVAILABLE, self.retain_available, to);
        u32_property(id::MAXIMUM_PACKET_SIZE, self.maximum_packet_size, to);
        text_property(
            id::ASSIGNED_CLIENT_IDENTIFIER,
            "the assigned client identifier",
            self.assigned_client_id.as_ref(),
            to,
        )?;
        u16_property(id::TOPIC_ALIAS_MAXIMUM, self.topic_alias_maximum, to);
        text_property(
            id::REASON_STRING,
            "the reason string",
            self.reason_string.as_ref(),
            to,
        )?;
        self.user_properties.write(to)?;
        bool_property(
            id::WILDCARD_SUBSCRIPTION_AVAILABLE,
            self.wildcard_subscription_available,
            to,
        );
        bool_property(
            id::SUBSCRIPTION_IDENTIFIER_AVAILABLE,
            self.subscription_ids_available,
            to,
        );
        bool_property(
            id::SHARED_SUBSCRIPTION_AVAILABLE,
            self.shared_subscription_available,
            to,
        );
        u16_property(id::SERVER_KEEP_ALIVE, self.server_keep_alive_s, to);
        text_property(
            id::RESPONSE_INFORMATION,
            "the response information",
            self.response_information.as_ref(),
            to,
        )?;
        write_server_reference(self.server_reference.as_ref(), to)?;
        write_authentication(
            self.authentication_method.as_ref(),
            self.authentication_data.as_deref(),
            to,
        )
    }
}

impl PropertySet for Option<Box<ReasonProperties>> {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        let Some(properties) = self else {
            return Ok(());
        };
        text_property(
            id::REASON_STRING,
            "the reason string",
            properties.reason_string.as_ref(),
            to,
        )?;
        properties.user_properties.write(to)
    }
}

pub(crate) struct SubscribePropertySet<'a> {
    pub(crate) subscription_id: Option<u32>,
    pub(crate) user_properties: &'a UserProperties,
}

impl PropertySet for SubscribePropertySet<'_> {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        if let Some(value) = self.subscription_id {
            write_subscription_id(value, to)?;
        }
        self.user_properties.write(to)
    }
}

impl PropertySet for DisconnectProperties {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        u32_property(
            id::SESSION_EXPIRY_INTERVAL,
            self.session_expiry_interval_s,
            to,
        );
        text_property(
            id::REASON_STRING,
            "the reason string",
            self.reason_string.as_ref(),
            to,
        )?;
        self.user_properties.write(to)?;
        write_server_reference(self.server_reference.as_ref(), to)
    }
}

impl PropertySet for Auth {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        write_authentication(
            self.authentication_method.as_ref(),
            self.authentication_data.as_deref(),
            to,
        )?;
        text_property(
            id::REASON_STRING,
            "the reason string",
            self.reason_string.as_ref(),
            to,
        )?;
        self.user_properties.write(to)
    }
}

impl PropertySet for UserProperties {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError> {
        for (name, value) in self {
            to.u8(id::USER_PROPERTY);
            to.text("the name of a user property", name)?;
            to.text("the value of a user property", value)?;
        }
        Ok(())
    }
}

fn write_authentication<S: Sink>(
    method: Option<&ByteString>,
    data: Option<&[u8]>,
    to: &mut S,
) -> Result<(), EncodeError> {
    text_property(
        id::AUTHENTICATION_METHOD,
        "the authentication method",
        method,
        to,
    )?;
    if let Some(data) = data {
        to.u8(id::AUTHENTICATION_DATA);
        to.binary("the authentication data", data)?;
    }
    Ok(())
}

fn write_server_reference<S: Sink>(
    reference: Option<&ByteString>,
    to: &mut S,
) -> Result<(), EncodeError> {
    text_property(id::SERVER_REFERENCE, "the server reference", reference, to)
}

fn text_property<S: Sink>(
    id: u8,
    what: &'static str,
    text: Option<&ByteString>,
    to: &mut S,
) -> Result<(), EncodeError> {
    let Some(text) = text else { return Ok(()) };
    to.u8(id);
    to.text(what, text)
}

fn bool_property<S: Sink>(id: u8, value: Option<bool>, to: &mut S) {
    if let Some(value) = value {
        to.u8(id);
        to.u8(u8::from(value));
    }
}

fn u16_property<S: Sink>(id: u8, value: Option<u16>, to: &mut S) {
    if let Some(value) = value {
        to.u8(id);
        to.u16(value);
    }
}

fn u32_property<S: Sink>(id: u8, value: Option<u32>, to: &mut S) {
    if let Some(value) = value {
        to.u8(id);
        to.u32(value);
    }
}
