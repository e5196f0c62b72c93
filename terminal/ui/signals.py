"""What lamps and buzzer say beside each screen (EMV Contactless Book A, user interface). Pure, like the screens."""

from __future__ import annotations

from drivers.interfaces import LampState, Tone
from terminal.ui import screens
from terminal.ui.screens import Screen


def lamps(screen: Screen) -> LampState:
    """The lamps that go with a screen."""
    match screen:
        case screens.Start() | screens.Recovering() | screens.Busy():
            return LampState.NOT_READY
        case screens.Idle() | screens.EnterAmount():
            return LampState.IDLE
        case screens.PresentCard() | screens.TryAgain():
            return LampState.READY
        case screens.Reading() | screens.ChooseApplication() | screens.Authorising():
            return LampState.PROCESSING
        case screens.Approved() | screens.AcceptedOffline() | screens.RemoveCard():
            return LampState.CARD_READ
        case (
            screens.Declined() | screens.OneCardOnly() | screens.UseOtherCard() | screens.KeepOrVoid() | screens.Error()
        ):
            return LampState.ERROR


def tone(screen: Screen) -> Tone | None:
    """The tone with which a screen appears. The success tone is only for money that is safe."""
    match screen:
        case screens.Approved() | screens.AcceptedOffline():
            return Tone.SUCCESS
        case screens.Declined() | screens.OneCardOnly() | screens.UseOtherCard() | screens.TryAgain():
            return Tone.ALERT
        case screens.Error() | screens.KeepOrVoid():
            return Tone.ALERT
        case _:
            return None
