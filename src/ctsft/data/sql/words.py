"""The words of the data set: its domains, tables with their columns, and what the columns are filled with."""

from typing import Literal

Split = Literal["train", "heldout"]

# One domain is three lines: its name, the parent table, and the child table, which refers to the parent. A table is
# `plural singular` (a child adds the preposition that links it to its parent) and then its columns; the first one is
# the label that names a row. A trailing ? allows NULL.
#   name:person    text, all different, as `_text` makes it            country        text, one of POOLS
#   kind=a|b|c     text, one of these                                  released@      date; the word is a participle
#   pages#90-900   integer, counted: "more than 300 pages"             price$5.00-60.00   number that can be summed
#   age~20-70      number that is only measured: "an age above 30"     (decimals as written in the range)
DOMAINS: dict[Split, str] = {
    "train": """
library
authors author name:person country award=Booker|Hugo|Nebula|Orwell? age~25-90 followers#100-9000
books book by title:work genre=fantasy|history|poetry|crime pages#90-900 price$5.00-60.00 published@ rating~1.0-5.0?

school
teachers teacher name:person subject=math|music|physics|art age~24-65 salary$30000-80000 hired@
students student of name:person city absences#0-40 score~10.0-99.0 club=chess|drama|robotics? enrolled@

clinic
doctors doctor name:person specialty=surgery|cardiology|pediatrics salary$60000-190000 hired@ phone:phone?
patients patient of name:person city age~1-95 weight~40-120? visits#1-40 admitted@ discharged@?

farm
farmers farmer name:person region=north|south|east|west age~22-80 tractors#1-30 email:email?
fields field of name:place crop=wheat|corn|barley|oats area~1.0-90.0 harvest$10-900? trees#0-99 sown@

restaurant
restaurants restaurant name:firm city cuisine=Thai|Italian|Mexican|Greek rating~1.0-5.0? tables#5-60 opened@
dishes dish at name:Soup|Curry|Pie|Salad course=main|dessert|side price$4.00-40.00 calories#90-900 added@ served@?

cinema
directors director name:person country age~25-85 awards#0-40 agency=Apex|Lumen|Orbit?
movies movie by title:work genre=drama|comedy|horror|thriller budget$1-200 duration~70-220 released@ rating~1.0-9.9?

music
singers singer name:person country voice=tenor|alto|bass|soprano age~18-80 manager:person?
albums album by title:work style=jazz|rock|folk|soul tracks#5-40 price$6.00-40.00 released@ score~10-100?

shop
suppliers supplier name:firm country rating~1.0-5.0? orders#10-900 contracted@
products product from name:Lamp|Desk|Kettle|Mug category=kitchen|office|garden price$3-300 stock$0-500 color? launched@

hotel
hotels hotel name:place city rating~1.0-5.0 rooms#20-400 renovated@? manager:person?
bookings booking at guest:person package=basic|breakfast|full nights#1-30 price$50-2500 made@ paid@?

sports
teams team name:place league=premier|national|regional wins#0-60 coach:person? budget$1-300 founded@
players player of name:person position=goalkeeper|defender|striker age~17-40 goals#0-60 salary$20-900? signed@

company
offices office name:place city floor~1-40 desks#10-300 rent$1000-30000? opened@
employees employee at name:person role=engineer|analyst|clerk salary$30000-120000 age~20-66 hired@ bonus$100-900?

bank
customers customer name:person city segment=private|business|student income$15000-150000 phone:phone? joined@
accounts account of code:code type=savings|checking|joint balance$10-9000 rate~0.1-6.0? transfers#0-200 opened@ closed@?

garage
owners owner name:person city age~18-85 phone:phone? discount~1-30?
cars car of plate:code brand=Fiat|Volvo|Toyota|Skoda color mileage~5000-200000 price$900-40000 bought@ inspected@?

gym
trainers trainer name:person sport=yoga|boxing|spinning|pilates age~20-60 fee$15-120 certified@?
members member with name:person level=beginner|intermediate|advanced age~16-80 sessions#1-150 weight~45-120? registered@

bakery
bakers baker name:person city shift=morning|evening|night wage$12.00-40.00 hired@ email:email?
cakes cake by name:Tart|Muffin|Pie flavor=lemon|vanilla|cherry price$2.00-60.00 layers#1-20 weight~0.2-6.0? baked@

garden
gardens garden name:place city style=formal|wild|alpine area~50-5000 visitors#100-9000? opened@
plants plant in name:Fern|Rose|Lily|Sage color height~5-400 price$2-80? leaves#3-300 season=spring|summer|fall planted@

newspaper
journalists journalist name:person country beat=politics|science|culture age~22-70 followers#100-9000 phone:phone?
articles article by title:work section=world|local|opinion words#200-4000 clicks#50-9000 published@ corrected@?

games
studios studio name:firm country employees#5-900 revenue$1-500? founded@
games game by title:work genre=puzzle|racing|strategy|arcade price$1.00-70.00 levels#5-200 score~10-100? released@

software
developers developer name:person city language age~18-65 commits#10-9000 email:email?
apps app by name:Notes|Maps|Mail platform=android|ios|web size~1-400 price$0.50-30.00? downloads#10-9000 updated@

realty
agents agent name:person city commission~1.0-9.0 deals#1-200 licensed@ phone:phone?
houses house of address:street type=villa|cottage|bungalow price$90-900 bedrooms#1-20 size~40-500? listed@ sold@?

charity
charities charity name:firm country cause=water|health|education volunteers#10-900 founded@ website:site?
donations donation to donor:person method=card|cash|transfer amount$5-5000 fee$0.10-9.00? received@ acknowledged@?

theater
theaters theater name:place city seats#80-2000 director:person? built@
plays play at title:work genre=tragedy|comedy|musical acts#1-20 price$10.00-120.00 length~40-240? premiered@

university
professors professor name:person faculty=law|medicine|arts|science age~30-75 papers#5-300 hired@ office:code?
courses course by title:work level=bachelor|master|doctoral credits#1-30 fee$100-3000 capacity~10-300? approved@

kennel
breeders breeder name:person country kennels#1-40 age~20-80 licensed@ website:site?
dogs dog from name:pet breed=beagle|poodle|collie|boxer color weight~2.0-70.0 price$100-3000 vaccinated@? born@

harbor
harbors harbor name:place country depth~4-60 cranes#1-60 opened@
ships ship in name:work type=tanker|ferry|trawler length~20-400 passengers#3-900 cabins#2-300? built@ repaired@?

observatory
astronomers astronomer name:person country age~24-90 papers#1-300 institute=Keck|Palomar|Lick?
comets comet of name:code class=short|long|great period~3.0-400.0? tails#1-20 magnitude~1-20 discovered@

insurance
clients client name:person city job=pilot|cook|nurse|farmer age~18-90 claims#0-40 email:email?
policies policy of code:code type=home|travel|life|pet premium$50-3000 renewals#0-30 signed@ cancelled@?

rental
landlords landlord name:person city age~30-85 buildings#1-40 phone:phone?
apartments apartment of address:street heating=gas|electric|solar rent$300-4000 windows#1-30 size~20-200 built@ rented@?

fashion
designers designer name:person country age~20-75 shows#1-90 label=Moda|Vero|Luce?
dresses dress by name:Gown|Tunic|Wrap|Shift fabric=silk|cotton|linen|wool color price$20-900 buttons#0-40 sold@? sewn@

concerts
venues venue name:place city capacity~100-9000 bars#1-30 rent$200-9000? opened@
concerts concert at title:work genre=rock|opera|blues|techno price$10-150 songs#8-50 sponsor=Zenit|Sol? announced@

bridges
rivers river name:place country length~50-3000 dams#0-40 depth~2.0-60.0?
bridges bridge over name:place material=steel|stone|wood|concrete length~20-2000 lanes#1-20 cost$1-400? opened@

hiking
guides guide name:person country language age~20-70 climbs#3-300 phone:phone?
hikes hike with name:place difficulty=easy|medium|hard distance~2.0-60.0 price$10-300 huts#0-20 scheduled@ cancelled@?
""",
    "heldout": """
airline
airlines airline name:firm country planes#5-400 rating~1.0-5.0? founded@
flights flight of code:code destination=Rome|Tokyo|Cairo|Lima seats#60-400 fare$40-1500 distance~200-9000? scheduled@

museum
museums museum name:place city visitors#100-9000 fee$2.00-30.00? opened@ director:person?
paintings painting in title:work technique=oil|watercolor|tempera value$5-900 height~20-300 painted@ restored@?

zoo
zoos zoo name:place country area~5-300 keepers#5-200 fee$5.00-40.00? opened@
animals animal in name:pet kind=lion|zebra|otter|panda age~1-40 weight~3-900? teeth#10-60 born@ examined@?

brewery
breweries brewery name:firm country tanks#2-60 output$10-900 founded@ website:site?
beers beer from name:work style=lager|stout|porter strength~2.0-12.0 price$1.00-15.00 reviews#5-900 brewed@ sold@?

hospital
hospitals hospital name:place city beds#30-900 budget$5-500? opened@
nurses nurse at name:person ward=surgery|oncology|maternity age~21-65 salary$20000-60000 shifts#3-60 hired@ certified@?

winery
vineyards vineyard name:place region=coast|valley|hills|plateau altitude~10-900 hectares#3-200 owner:person? planted@
wines wine from name:work grape=merlot|riesling|syrah|malbec price$5.00-90.00 bottles#50-9000 score~60-100? bottled@

podcast
hosts host name:person country age~18-75 sponsors#1-40 microphone=Rode|Shure|Neumann?
episodes episode by title:work topic=travel|crime|food duration~10-180 listeners#100-9000 rating~1.0-5.0? recorded@

railway
stations station name:place city platforms#1-40 elevation~5-900? built@ manager:person?
trains train from code:code type=express|local|freight wagons#2-60 speed~60-320 fare$3.00-120.00? serviced@

law
lawyers lawyer name:person city specialty=tax|patent|family|labor rate$80-600 wins#0-200 phone:phone?
lawsuits lawsuit of code:code court=civil|criminal|appeal cost$10-900 witnesses#0-30 duration~5-400? filed@ settled@?

robotics
labs lab name:firm country engineers#3-200 budget$10-900 founded@ sponsor=Axon|Delta|Rhine?
robots robot from name:Rover|Arm|Drone task=welding|cleaning|mapping weight~1-300 sensors#2-60 price$10-900? built@

beekeeping
beekeepers beekeeper name:person country age~20-85 suits#1-30 email:email?
hives hive of name:code location=forest|meadow|roof|orchard frames#4-40 yield$1-90 weight~5-90? installed@ treated@?

space
agencies agency name:firm country budget$10-900 launches#1-200 founded@ website:site?
satellites satellite of name:code orbit=low|medium|polar mass~20-6000 antennas#1-30 cost$5-900? launched@ retired@?
""",
}

FIRST = (
    "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karin Liam Maria Noah Olga Peter Rosa Simon Tara Victor"
)
LAST = (
    "Adams Berg Costa Dunn Evans Fischer Garcia Hill Ito Jensen Kowal Lopez Moore Novak O'Neill Park Quinn Rossi Silva"
)
ADJECTIVE = "Silent Golden Broken Hidden Winter Crimson Distant Lonely Electric Secret Northern Paper Burning Quiet"
NOUN = "River Garden Mirror Voyage Harvest Shadow Island Letter Engine Harbor Crown Forest Signal Window"
PREFIX = "Oak Ash River Stone Maple Green White West High Clear Fair Spring"
SUFFIX = "field ford ton brook dale wood haven bridge"
FIRM = "Vega Norda Solis Altura Brava Corvus Delmar Ember Fjord Halcyon Ivora Juno Kestrel Lumina Mistral Onda Pinnacle"
PET = "Rex Luna Milo Bella Coco Rocky Nala Simba Daisy Ziggy Otto Pepper Hazel Bruno Kiwi Pixie Shadow Ruby"
MAKER = "Nova Terra Alpha Orion Breeze Classic Royal Urban Mini Turbo"
MONTHS = "January February March April May June July August September October November December"
POOLS = {
    "country": "Norway Brazil Japan Kenya Canada Italy Poland Chile",
    "city": "Oslo Lyon Porto Boston Dublin Kyoto Quito Vienna",
    "color": "red blue green black white",
    "language": "Spanish French German Arabic Hindi",
}
